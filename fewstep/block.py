"""The base of every config block: frozen, and an unknown key is an error."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

SolverName = Literal["euler", "heun", "midpoint"]
"""The ODE solvers a config may name."""

PathName = Literal["linear", "cosine", "variance_preserving"]
"""The paths a config may name."""


PrecisionName = Literal["fp32", "tf32", "bf16"]
"""The precisions a config may name: true float32; float32 whose products may run in TF32 on a GPU; bfloat16 where that
is safe, and TF32 allowed in what stays float32."""

ProductsName = Literal["fp32", "tf32"]
"""How products of float32 tensors may be computed."""


def products_of(precision: PrecisionName) -> ProductsName:
    """How float32 is multiplied under a precision. What stays float32 in ``bf16`` takes its inputs from layers of
    7-bit mantissas and hands its results to such: TF32 has 10 bits."""
    return "fp32" if precision == "fp32" else "tf32"


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
