"""Files of embeddings: a safetensors file, or a folder of them in the order of their names.

They have tensors ``NAME [N, ...]``, whose rows belong to the samples of a data set in their order, and ``none.NAME [1,
...]``, what stands for no condition (an empty text, say). The names are those that the network which reads them wants,
such as ``encoder_hidden_states``. Rows stay in the memory map of their files until they are drawn.
"""

from pathlib import Path

from torch import Tensor

from fewstep.data.embeddings import EmbeddingRows
from fewstep.data.rows import joined
from fewstep.data.shards import map_tensors, tensor_names
from fewstep.errors import UsageError

NONE = "none."
"""What the name of a tensor that stands for no condition begins with."""


def load_embeddings(path: Path, count: int | None = None, *, first: bool = False) -> EmbeddingRows:
    """The embeddings at ``path``, for ``count`` samples unless that is None, or for the ``first`` of more. What does
    not fit is a ``UsageError``."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise UsageError(f"data.embeddings: {path} is no safetensors file, and no folder of them")
    parts: dict[str, list[Tensor]] = {}
    none: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in map_tensors(file, sorted(tensor_names(file))).items():
            if name.startswith(NONE):
                none[name.removeprefix(NONE)] = tensor.clone()
            else:
                parts.setdefault(name, []).append(tensor)
    if not parts:
        raise UsageError(f"data.embeddings: {path} holds no tensors of samples")
    lengths = {name: sum(map(len, tensors)) for name, tensors in parts.items()}
    wanted = count if count is not None else next(iter(lengths.values()))
    for name, tensors in parts.items():
        if lengths[name] < wanted or (lengths[name] > wanted and not first):
            raise UsageError(f"data.embeddings: {path} has {lengths[name]} rows of {name} for {wanted} samples")
        if name not in none or none[name].shape != (1, *tensors[0].shape[1:]):
            raise UsageError(
                f"data.embeddings: {path} has to say what stands for no condition: a tensor {NONE}{name} of shape "
                f"{[1, *tensors[0].shape[1:]]}"
            )
    surplus = sorted(none.keys() - parts.keys())
    if surplus:
        raise UsageError(f"data.embeddings: {path} has {NONE}{surplus[0]} and no {surplus[0]}")
    return EmbeddingRows({name: joined(tensors, wanted) for name, tensors in parts.items()}, none)
