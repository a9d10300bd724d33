"""The base of every config block: frozen, and an unknown key is an error."""

from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
