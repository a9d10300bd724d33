"""The Inception network that FID is defined on (Heusel et al. 1706.08500), with the published weights' own names.

It is Inception-v3 (Szegedy et al. 1512.00567) as TensorFlow's graph of December 2015 has it, which differs from the
usual one: average pools leave the padding out of the average, the pooling branch of the last block takes the maximum,
and there are 1008 classes. Its state dict has the 566 entries of ``pt_inception-2015-12-05-6726825d.pth``.

Shapes: N images, C channels, H by W positions.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 299
FEATURES = 2048
CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17


class Conv(NamedTuple):
    """A convolution of a block: its name, output channels, kernel (height, width) and stride. With stride 1 it keeps
    the map's size, with stride 2 it does not pad."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


Chain = Sequence[Conv | tuple[Conv, ...]]
"""Convolutions one after another; a tuple of them works side by side on the same map."""


class ConvNorm(nn.Module):
    """Convolution without a bias, batch normalisation, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], *, stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions and a pool, side by side; their channels in a row.

    ``pool`` is ``average`` or ``max``, followed by a convolution to ``pooled`` channels, or ``reduce``: a maximum with
    stride 2 and nothing after it.
    """

    def __init__(
        self, inputs: int, chains: Sequence[Chain], pool: Literal["average", "max", "reduce"], pooled: int = 0
    ) -> None:
        super().__init__()
        self.pool = pool
        self.chains: list[list[tuple[str, ...]]] = []
        outputs = 0
        for chain in chains:
            width, names = inputs, []
            for link in chain:
                convs = (link,) if isinstance(link, Conv) else link
                for conv in convs:
                    self.add_module(conv.name, _conv(width, conv))
                width = sum(conv.channels for conv in convs)
                names.append(tuple(conv.name for conv in convs))
            self.chains.append(names)
            outputs += width
        if pooled:
            self.branch_pool = ConvNorm(inputs, pooled, (1, 1))
        self.channels = outputs + (pooled or inputs)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            y = x
            for names in chain:
                parts = [self.get_submodule(name)(y) for name in names]
                y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outputs.append(y)
        if self.pool == "average":
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        elif self.pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            outputs.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, 1)


def _conv(inputs: int, conv: Conv) -> ConvNorm:
    height, width = conv.kernel
    padding = (height // 2, width // 2) if conv.stride == 1 else (0, 0)
    return ConvNorm(inputs, conv.channels, conv.kernel, stride=conv.stride, padding=padding)


def _block_5(inputs: int, pooled: int) -> Mixed:
    """At 35 x 35: 1x1, 5x5, twice 3x3."""
    return Mixed(
        inputs,
        (
            (Conv("branch1x1", 64),),
            (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3)),
            ),
        ),
        "average",
        pooled,
    )


def _block_6(inputs: int, width: int) -> Mixed:
    """At 17 x 17: 1x1, 7x7 in two directions, the same twice."""
    return Mixed(
        inputs,
        (
            (Conv("branch1x1", 192),),
            (
                Conv("branch7x7_1", width),
                Conv("branch7x7_2", width, (1, 7)),
                Conv("branch7x7_3", 192, (7, 1)),
            ),
            (
                Conv("branch7x7dbl_1", width),
                Conv("branch7x7dbl_2", width, (7, 1)),
                Conv("branch7x7dbl_3", width, (1, 7)),
                Conv("branch7x7dbl_4", width, (7, 1)),
                Conv("branch7x7dbl_5", 192, (1, 7)),
            ),
        ),
        "average",
        192,
    )


def _block_7(inputs: int, pool: Literal["average", "max"]) -> Mixed:
    """At 8 x 8: 1x1, 3x3 as its two directions side by side, the same behind a 3x3."""
    return Mixed(
        inputs,
        (
            (Conv("branch1x1", 320),),
            (
                Conv("branch3x3_1", 384),
                (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1))),
            ),
            (
                Conv("branch3x3dbl_1", 448),
                Conv("branch3x3dbl_2", 384, (3, 3)),
                (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
            ),
        ),
        pool,
        192,
    )


def _reduce_6(inputs: int) -> Mixed:
    """From 35 x 35 to 17 x 17."""
    return Mixed(
        inputs,
        (
            (Conv("branch3x3", 384, (3, 3), 2),),
            (
                Conv("branch3x3dbl_1", 64),
                Conv("branch3x3dbl_2", 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, (3, 3), 2),
            ),
        ),
        "reduce",
    )


def _reduce_7(inputs: int) -> Mixed:
    """From 17 x 17 to 8 x 8."""
    return Mixed(
        inputs,
        (
            (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
            (
                Conv("branch7x7x3_1", 192),
                Conv("branch7x7x3_2", 192, (1, 7)),
                Conv("branch7x7x3_3", 192, (7, 1)),
                Conv("branch7x7x3_4", 192, (3, 3), 2),
            ),
        ),
        "reduce",
    )


class InceptionNetwork(nn.Module):
    """Scaled colour images ``[N, 3, 299, 299]`` -> pooled features ``[N, 2048]`` and the spatial map ``[N, 2023]``.

    The map holds the first 7 channels of ``Mixed_6d.branch1x1`` behind its ReLU, flattened in the order H, W, C: the
    features of sFID (Nash et al. 2103.03841), in the order of the statistics that others publish.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3))
        self.Mixed_5b = _block_5(192, 32)
        self.Mixed_5c = _block_5(self.Mixed_5b.channels, 64)
        self.Mixed_5d = _block_5(self.Mixed_5c.channels, 64)
        self.Mixed_6a = _reduce_6(self.Mixed_5d.channels)
        self.Mixed_6b = _block_6(self.Mixed_6a.channels, 128)
        self.Mixed_6c = _block_6(self.Mixed_6b.channels, 160)
        self.Mixed_6d = _block_6(self.Mixed_6c.channels, 160)
        self.Mixed_6e = _block_6(self.Mixed_6d.channels, 192)
        self.Mixed_7a = _reduce_7(self.Mixed_6e.channels)
        self.Mixed_7b = _block_7(self.Mixed_7a.channels, "average")
        self.Mixed_7c = _block_7(self.Mixed_7b.channels, "max")
        self.fc = nn.Linear(self.Mixed_7c.channels, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # A block's first channels are those of its branch1x1: the map is in its output, nothing runs twice.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return F.adaptive_avg_pool2d(x, 1).flatten(1), spatial

    def logits(self, features: Tensor) -> Tensor:
        """Features ``[N, 2048]`` -> logits ``[N, 1008]`` without the bias, as the Inception score is defined."""
        return F.linear(features, self.fc.weight)


def inception_network(state: dict[str, Tensor]) -> InceptionNetwork:
    """The network with these weights, frozen, in eval mode. Names and shapes have to be exactly its own."""
    with torch.device("meta"):
        network = InceptionNetwork()
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)
