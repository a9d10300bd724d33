"""The formats by the kind that a config says."""

from fewstep.teachers.formats.base import Format
from fewstep.teachers.formats.minrf import MINRF
from fewstep.teachers.formats.sit import DIT, REPA, SIT

FORMATS: dict[str, Format] = {format.name: format for format in (SIT, DIT, REPA, MINRF)}
