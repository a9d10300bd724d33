"""Training of the classifier whose features measure the user's own images: `fewstep data classifier`.

A fifth of the images is held out and measures the accuracy that the card states; of many, at most 10,000 are. Where
the data set has a test set of its own that measures it, and nothing is held out. What is learnt from is shifted by up
to an eighth of the side and made noisy, as generated images are off in such ways: a network that has seen them grades
them instead of saturating. Nothing is mirrored unless that is asked for: digits and letters are not.

Shapes: N images, B of a batch, C channels, H by W pixels.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.block import PrecisionName, products_of
from fewstep.data.dataset import Dataset
from fewstep.errors import FewstepError, UsageError
from fewstep.evaluation.classifier import CARD, FEATURE_DIM, WIDTHS, ImageClassifier, write_classifier
from fewstep.evaluation.quantise import to_uint8
from fewstep.files import check_folder
from fewstep.keys import Key
from fewstep.precision import products

HELD_OUT = 5
MOST_HELD_OUT = 10_000
FEWEST = 20
LR = 3e-3
WEIGHT_DECAY = 1e-2
NOISE = 0.2


def train_classifier(
    data: Dataset,
    out: Path,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    test: Dataset | None = None,
    widths: Sequence[int] = WIDTHS,
    feature_dim: int = FEATURE_DIM,
    flip: bool = False,
    precision: PrecisionName = "fp32",
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Train on labelled images, write the classifier to ``out`` and return its card.

    The card has the accuracy on the held-out images (``accuracy``, a share), ``held_out`` (their number), and what the
    classifier was trained on. They are a part of ``data``, or all of ``test``, which the card then names
    (``tested_on``). ``flip`` mirrors half of what is trained on; ``precision`` is that of the products in training, the
    accuracy is of float32. Data without images or classes, a test set of other classes or another shape, widths that
    are not multiples of 8, and a folder that holds something are a ``UsageError``.
    """
    label = _check(data, out, overwrite)
    if not widths or any(width < 8 or width % 8 for width in widths):
        raise UsageError(f"widths are multiples of 8, not {','.join(map(str, widths)) or 'none'}")
    key = Key(seed)
    order = key.permutations("held out", len(label), 1, torch.device("cpu"))[0]
    if test is None:
        held_out = order[: min(len(label) // HELD_OUT, MOST_HELD_OUT)]
        training, asked, answers = order[len(held_out) :], data, label
    else:
        answers = _check_test(data, test)
        held_out, training, asked = torch.arange(len(answers)), order, test
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the initial weights
        network = ImageClassifier(data.shape[0], data.num_classes, widths, feature_dim)
    # channels_last: convolutions of a CPU take 0.75 of the time, those of a GPU their tensor cores.
    network = network.to(memory_format=torch.channels_last).to(device)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for step in range(steps):
        at = Key(seed, step)
        drawn = at.uniform("classifier", torch.arange(batch_size)).mul(len(training)).long()
        rows = training[drawn]
        images = augment(data.samples(rows).to(device), at)
        if flip:
            mirrored = at.uniform("classifier flip", torch.arange(batch_size, device=device)) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        optimizer.zero_grad()
        with products(products_of(precision)):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = network(to_uint8(images))
            loss = F.cross_entropy(logits.float(), label[rows].to(device), label_smoothing=0.05)
            if not bool(torch.isfinite(loss)):
                raise FewstepError(f"the loss of the classifier is not finite at step {step + 1}: nothing was written")
            loss.backward()
        optimizer.step()
        schedule.step()
        report(step + 1, steps)
    network.eval().requires_grad_(False)
    with products("fp32"):
        right = sum(
            int((network(to_uint8(asked.samples(rows).to(device))).argmax(1).cpu() == answers[rows]).sum())
            for rows in held_out.split(256)
        )
    facts = {
        "dataset": data.name,
        "shape": list(data.shape),
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "trained_on": len(training),
        "held_out": len(held_out),
        **({} if test is None else {"tested_on": test.name}),
        "accuracy": right / len(held_out),
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "flip": flip,
        "precision": precision,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return write_classifier(out, network, facts)


def augment(x: Tensor, key: Key) -> Tensor:
    """Images ``[B, C, H, W]`` in [-1, 1], each shifted by up to an eighth of a side with its border repeated, and with
    Gaussian noise of a deviation up to 0.2."""
    index = torch.arange(len(x), device=x.device)
    height, width = x.shape[2:]
    most = torch.tensor([height // 8, width // 8], device=x.device)
    shift = (key.uniform("classifier shift", index, (2,)) * (2 * most + 1)).long() - most
    rows = (torch.arange(height, device=x.device) + shift[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + shift[:, 1:]).clamp(0, width - 1)
    x = x[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    level = NOISE * key.uniform("classifier level", index, (1, 1, 1)).float()
    return (x + level * key.normal("classifier noise", index, tuple(x.shape[1:]))).clamp(-1, 1)


def _check_test(data: Dataset, test: Dataset) -> Tensor:
    """The labels of a test set, which has the shape and the classes of the data."""
    if test.label is None or test.num_classes != data.num_classes or test.class_names != data.class_names:
        raise UsageError(f"the test set {test.name} has {test.num_classes} classes, {data.name} {data.num_classes}")
    if test.shape != data.shape:
        raise UsageError(f"the test set {test.name} has images of {test.shape}, {data.name} of {data.shape}")
    return test.label.cpu()


def _check(data: Dataset, out: Path, overwrite: bool) -> Tensor:
    """The labels of data that a classifier can be trained on."""
    if data.kind != "image":
        raise UsageError(f"a classifier takes images and {data.name} has {data.kind}")
    if data.label is None or data.num_classes < 2:
        raise UsageError(f"a classifier needs two classes or more and {data.name} has {data.num_classes or 'none'}")
    if len(data.x) < FEWEST:
        raise UsageError(f"{data.name} has {len(data.x)} images: a classifier needs {FEWEST} or more")
    if (out / CARD).exists() and not overwrite:
        raise UsageError(f"{out} holds a classifier: give another --out, or --overwrite")
    if out.exists() and not (out / CARD).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder: give another --out")
    check_folder(out.absolute())
    return data.label.cpu()
