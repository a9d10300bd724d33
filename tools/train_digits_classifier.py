"""Train the network behind the ``digits`` features and write ``fewstep/evaluation/digits_classifier.safetensors``.

Command: ``python tools/train_digits_classifier.py`` (about 20 s on one CPU core; deterministic).
Four fifths of the shipped digits train it, the rest (every fifth image) measure the accuracy the metadata states.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from fewstep.evaluation.digits_classifier import WEIGHTS, DigitsClassifier
from fewstep.evaluation.quantise import to_uint8

DIGITS = Path(__file__).parents[1] / "fewstep" / "data" / "digits.safetensors"


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Small linear maps, shifts of up to 0.6 pixels and noise, for images ``x [B, 1, 8, 8]`` in [-1, 1].

    Generated digits are off in such ways; a network that has seen them grades them instead of saturating.
    """
    batch = len(x)
    linear = torch.eye(2) + 0.1 * torch.randn(batch, 2, 2, generator=generator)
    shift = (torch.rand(batch, 2, 1, generator=generator) - 0.5) * 0.3
    grid = F.affine_grid(torch.cat((linear, shift), dim=2), list(x.shape), align_corners=False)
    x = F.grid_sample(x + 1, grid, align_corners=False) - 1  # +1: zeros outside the image are its background
    noise_level = 0.3 * torch.rand(batch, 1, 1, 1, generator=generator)
    return (x + noise_level * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def train(x: Tensor, labels: Tensor, *, steps: int, batch_size: int, seed: int) -> DigitsClassifier:
    """AdamW with a cosine schedule on augmented, quantised batches of ``x [N, 1, 8, 8]`` in [-1, 1]."""
    torch.manual_seed(seed)  # the initial weights
    generator = torch.Generator().manual_seed(seed)
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(x), (batch_size,), generator=generator)
        images = to_uint8(augment(x[index], generator))
        loss = F.cross_entropy(network(images), labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: DigitsClassifier, x: Tensor, labels: Tensor) -> float:
    return float((network(to_uint8(x)).argmax(1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # the order of summation, and so the weights, must not depend on the machine's cores
    torch.use_deterministic_algorithms(True)
    digits = load_file(DIGITS)
    x = digits["images"].float()[:, None] / 8 - 1
    labels = digits["labels"].long()
    held_out = torch.arange(len(x)) % 5 == 0
    start = time.perf_counter()
    network = train(x[~held_out], labels[~held_out], steps=args.steps, batch_size=args.batch_size, seed=args.seed)
    seconds = time.perf_counter() - start
    reached = accuracy(network, x[held_out], labels[held_out])
    on_training = accuracy(network, x[~held_out], labels[~held_out])
    print(f"held-out accuracy {reached:.4f} on {int(held_out.sum())}, training {on_training:.4f}, {seconds:.0f} s")
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()},
        args.out,
        metadata={
            "content": "convolutional classifier of 8x8 grey digits; its 64 penultimate activations are the features",
            "held_out_accuracy": f"{reached:.4f}",
            "held_out_images": f"{int(held_out.sum())} of {len(x)}: every fifth, starting with the first",
            "training": f"{args.steps} steps of {args.batch_size}, seed {args.seed}",
            "trained_by": "tools/train_digits_classifier.py",
            "licence": "Apache-2.0",
            "data": "Optical Recognition of Handwritten Digits (test part), E. Alpaydin and C. Kaynak, 1998, "
            "UCI Machine Learning Repository, doi:10.24432/C50P49, CC BY 4.0",
        },
    )


if __name__ == "__main__":
    main()
