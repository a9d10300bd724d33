"""From a data config to a data set. Nothing here touches a network."""

from importlib.resources import files

import torch
from safetensors.torch import load as load_safetensors

from fewstep.data.config import DataConfig, DigitsConfig
from fewstep.data.dataset import Dataset
from fewstep.data.toys import TOYS


def load_data(config: DataConfig) -> Dataset:
    if isinstance(config, DigitsConfig):
        return digits()
    toy = TOYS[config.name](config.count, config.seed)
    num_classes = 0 if toy.label is None else int(toy.label.max()) + 1
    return Dataset(f"toy-{config.name}", toy.x, toy.label, num_classes, kind="points")


def digits() -> Dataset:
    """The UCI handwritten digits (Alpaydin and Kaynak 1998, CC BY 4.0), shipped with the package: ``x [1797, 1, 8,
    8]``.

    Grey values 0 to 16 become [-1, 1].
    """
    tensors = load_safetensors((files("fewstep.data") / "digits.safetensors").read_bytes())
    x = tensors["images"].to(torch.float32).div(8).sub(1).unsqueeze(1)
    return Dataset("digits", x, tensors["labels"].to(torch.int64), num_classes=10, kind="image")
