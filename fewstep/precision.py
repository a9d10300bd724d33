"""What float32 means for products on a GPU: true float32, or TF32, which rounds the factors to 10 bits.

Torch leaves it to the kind of layer: unless told otherwise, convolutions take TF32 and matrix products do not. Here
both are told the same, for as long as it takes, and a caller's own choice comes back afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fewstep.block import ProductsName


@contextmanager
def products(kind: ProductsName) -> Iterator[None]:
    """Run with products and convolutions of float32 tensors in true float32 (``fp32``), or free to run in TF32.

    The flags are the process's: backward passes, whatever thread they run on, and compiled graphs, which look at them
    whenever they are called, see them too. A CPU multiplies in float32 either way.
    """
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    on_cpu = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    _set_matrices(kind)
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        if matrices == "high" and on_cpu != "tf32":
            _set_matrices("tf32")
        else:
            torch.set_float32_matmul_precision(matrices)


def _set_matrices(kind: ProductsName) -> None:
    torch.set_float32_matmul_precision("highest")
    if kind == "tf32":  # "high" would have some CPUs round, too
        torch.backends.cuda.matmul.allow_tf32 = True
