"""The digest of a data set: of its samples and labels alone, however they are stored."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import Dataset, LatentScale
from fewstep.files import digest, json_text

_BLOCK = 4096


class ContentDigest:
    """SHA-256 of samples in their order, fed in runs of any length."""

    def __init__(self) -> None:
        self._count = 0
        self._form = ""
        self._x, self._mirrored, self._label = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()

    def add(self, x: Tensor, label: Tensor | None, mirrored: Tensor | None) -> None:
        self._count += len(x)
        self._form = f"{x.dtype} {list(x.shape[1:])}"
        for stream, tensor in ((self._x, x), (self._mirrored, mirrored), (self._label, label)):
            if tensor is not None:
                stream.update(np.ascontiguousarray(tensor.numpy()).data)

    def result(self, num_classes: int, latent: LatentScale | None) -> str:
        parts = {
            "count": self._count,
            "form": self._form,
            "num_classes": num_classes,
            "samples": self._x.hexdigest(),
            "mirrored": self._mirrored.hexdigest(),
            "labels": self._label.hexdigest(),
            "latent": None if latent is None else latent.to_json(),
        }
        return digest(json_text(parts).encode())


def content_digest(data: Dataset) -> str:
    """Equal for two data sets exactly if a training cannot tell them apart (up to its own flips)."""
    stream = ContentDigest()
    for rows in torch.arange(len(data.x)).split(_BLOCK):
        label = None if data.label is None else data.label[rows]
        stream.add(data.x[rows], label, None if data.mirrored is None else data.mirrored[rows])
    return stream.result(data.num_classes, data.latent)
