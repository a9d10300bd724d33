"""The base of every config block: frozen, and an unknown key is an error."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

SolverName = Literal["euler", "heun", "midpoint"]
"""The ODE solvers a config may name."""

PathName = Literal["linear", "cosine", "variance_preserving"]
"""The paths a config may name."""


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
