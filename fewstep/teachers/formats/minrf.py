"""Checkpoints of minRF, in fewstep's own convention."""

from collections.abc import Mapping
from typing import Any

from fewstep.conventions import ConventionConfig
from fewstep.networks.foreign.config import MinRFConfig
from fewstep.teachers.formats.base import Format, Found, Weights
from fewstep.teachers.formats.shapes import classes, numbered, root, settled, shape_of

TITLE = "minRF"

HEADS = {(64, 6): 4, (256, 10): 8, (256, 16): 32, (512, 5): 16, (3072, 32): 32}
"""Of the sizes that its scripts and its module name (MNIST, CIFAR-10, 600M, the default, 3B), by width and depth."""


def _recognises(weights: Weights) -> bool:
    return {"init_conv_seq.0.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"} <= set(weights)


def _read(weights: Weights, said: Mapping[str, Any]) -> Found:
    """Its rotations count patches whatever their number, so no weight says how large an image is."""
    half, channels, *_ = shape_of(weights, "init_conv_seq.0.weight", 4, TITLE)
    width, entered = shape_of(weights, "x_embedder.weight", 2, TITLE)
    if width != 2 * half or entered % half:
        raise ValueError(f"x_embedder.weight of {width} x {entered} does not follow {half} channels: no minRF has that")
    patch = root(entered // half, "pixels of a patch")
    depth = numbered(weights, "layers", TITLE)
    last = shape_of(weights, "final_layer.linear.weight", 2, TITLE)
    if last != (patch**2 * channels, width):
        raise ValueError(f"final_layer.linear.weight has shape {list(last)}, not {[patch**2 * channels, width]}")
    num_classes, null_row = classes(shape_of(weights, "y_embedder.embedding_table.weight", 2, TITLE)[0], said)
    inferred: dict[str, Any] = {
        "patch": patch,
        "width": width,
        "depth": depth,
        "hidden": shape_of(weights, "layers.0.feed_forward.w1.weight", 2, TITLE)[0],
        "null_row": null_row,
    }
    if (width, depth) in HEADS and "heads" not in said:
        inferred["heads"] = HEADS[width, depth]
    elif "heads" not in said:
        raise ValueError(
            f"the weights of {depth} blocks {width} wide do not say how many heads they have: declare heads"
        )
    return Found(settled(MinRFConfig, inferred, said), channels, None, num_classes, dict(weights))


MINRF = Format(
    name="minrf", title=TITLE, convention=ConventionConfig(), recognises=_recognises, read=_read, license="unknown"
)
