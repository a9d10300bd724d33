"""The formats by the kind that a config says."""

from fewstep.teachers.formats.base import Format
from fewstep.teachers.formats.edm import EDM, EDM2
from fewstep.teachers.formats.flow_matching import FLOW_MATCHING
from fewstep.teachers.formats.minrf import MINRF
from fewstep.teachers.formats.rectified_flow import RECTIFIED_FLOW
from fewstep.teachers.formats.sit import DIT, REPA, SIT
from fewstep.teachers.formats.torchcfm import TORCHCFM

FORMATS: dict[str, Format] = {
    format.name: format for format in (SIT, DIT, REPA, MINRF, TORCHCFM, FLOW_MATCHING, RECTIFIED_FLOW, EDM, EDM2)
}
