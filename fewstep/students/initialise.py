"""A student that starts as its teacher."""

from torch import nn

from fewstep.errors import UsageError
from fewstep.networks.config import NetworkConfig
from fewstep.networks.foreign.config import DiffusersConfig
from fewstep.networks.foreign.lora import with_adapters
from fewstep.students.config import StudentConfig

SECOND_TIME = "embed_gap"
"""The module that a two-time network has beyond its one-time teacher. It ends in a zero layer."""

GUIDANCE = "embed_guidance"
"""The module of a network that takes guidance as an input. It ends in a zero layer."""


def network_of(student: StudentConfig, teacher: NetworkConfig | None) -> NetworkConfig:
    """The config of a student's network: its own, or its teacher's with the student's adapters."""
    network = student.network if student.network is not None else teacher
    assert network is not None  # the config has made sure
    if student.lora is None:
        return network
    if not isinstance(network, DiffusersConfig):
        raise UsageError(f"student.lora is for networks of diffusers, and the teacher's is of kind {network.kind}")
    return network.model_copy(update={"lora": student.lora})


def copy_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Copy every weight of a one- or two-time teacher into a two-time student.

    Afterwards ``student(x, t, r)`` equals ``teacher(x, t)`` to the bit if the teacher has one time: for every ``r``, or
    at ``r = t`` for a student that splits its blocks between the two; and for every guidance, if that is an input of
    the student alone. Adapters of the student stay as they are, which is without effect. Raises ``ValueError`` if
    anything but these and the embeddings of the second time and of guidance is missing, left over or of another shape.
    """
    target = student.state_dict()
    source = with_adapters(teacher.state_dict(), student)
    missing = [name for name in target if name not in source and not {SECOND_TIME, GUIDANCE} & {*name.split(".")}]
    surplus = [name for name in source if name not in target]
    reshaped = [name for name in source if name in target and source[name].shape != target[name].shape]
    if missing or surplus or reshaped:
        raise ValueError(
            "the student's network does not fit the teacher's: "
            f"missing {missing}, left over {surplus}, reshaped {reshaped}"
        )
    student.load_state_dict({**target, **source})
