"""Config of networks from elsewhere: what their weights do not say, and how to read them. Imports no torch."""

from fewstep.block import Block
from fewstep.conventions import ConventionConfig


class ForeignBlock(Block):
    """``convention`` is how the network counts time and what it says."""

    convention: ConventionConfig = ConventionConfig()
