"""The small network whose penultimate layer measures the shipped digits. Its weights are shipped beside it.

Trained by ``tools/train_digits_classifier.py``; the metadata of ``digits_classifier.safetensors`` states its held-out
accuracy. Smooth SiLU features keep responding to digits that are nearly, but not quite, right.
"""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_suffix(".safetensors")
NUM_CLASSES = 10
FEATURE_DIM = 64


class DigitsClassifier(nn.Module):
    """8x8 grey uint8 images ``[N, 1, 8, 8]`` -> features ``[N, 64]`` -> logits ``[N, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, FEATURE_DIM),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations of uint8 images; a grey level ``u`` enters as ``u / 127.5 - 1``."""
        return self.body(images.float() / 127.5 - 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def load_digits_classifier() -> DigitsClassifier:
    """The shipped network: float32, eval mode, frozen, on the CPU."""
    network = DigitsClassifier()
    with safe_open(WEIGHTS, framework="pt") as file:
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return network.eval().requires_grad_(False)
