"""A student that starts as its teacher."""

from torch import nn

SECOND_TIME = "embed_gap"
"""The module that a two-time network has beyond its one-time teacher. It ends in a zero layer."""

GUIDANCE = "embed_guidance"
"""The module of a network that takes guidance as an input. It ends in a zero layer."""


def copy_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Copy every weight of a one- or two-time teacher into a two-time student.

    Afterwards ``student(x, t, r)`` equals ``teacher(x, t)`` to the bit if the teacher has one time: for every ``r``, or
    at ``r = t`` for a student that splits its blocks between the two; and for every guidance, if that is an input of
    the student alone. Raises ``ValueError`` if anything but the embeddings of the second time and of guidance is
    missing, left over or of another shape.
    """
    source, target = teacher.state_dict(), student.state_dict()
    missing = [name for name in target if name not in source and not {SECOND_TIME, GUIDANCE} & {*name.split(".")}]
    surplus = [name for name in source if name not in target]
    reshaped = [name for name in source if name in target and source[name].shape != target[name].shape]
    if missing or surplus or reshaped:
        raise ValueError(
            "the student's network does not fit the teacher's: "
            f"missing {missing}, left over {surplus}, reshaped {reshaped}"
        )
    student.load_state_dict({**target, **source})
