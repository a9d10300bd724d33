"""Classes of images: from folder names, from EDM's ``dataset.json``, and what every set of labels has to fulfil."""

import json
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.errors import UsageError

_BUCKET = re.compile(r"(.*/)?\d{5}/img(-mean-std-)?\d{8}\.\w+")


def checked_labels(
    label: Sequence[int | None] | None, names: Sequence[str], where: str, wanted: bool | None
) -> tuple[Tensor | None, int]:
    """Labels ``[N]`` int64 and the number of classes, which is the largest label plus one; None and 0 without classes.

    ``names`` say how errors call the samples. Some samples without a label, labels below 0, a class between 0 and the
    largest that never occurs, or none at all where they are ``wanted`` are a ``UsageError``.
    """
    if wanted is False:
        return None, 0
    if label is None or all(each is None for each in label):
        if wanted:
            raise UsageError(f"{where} has no labels: leave out data.labels=true")
        return None, 0
    known = [each for each in label if each is not None]
    if len(known) < len(label):
        first = next(name for name, each in zip(names, label, strict=True) if each is None)
        raise UsageError(f"{first} has no label and {len(known)} others have one: label it, or set data.labels=false")
    if min(known) < 0:
        first = next(name for name, each in zip(names, known, strict=True) if each < 0)
        raise UsageError(f"{first} has the label {min(known)}: labels count from 0 (or set data.labels=false)")
    classes = set(known)
    if len(classes) <= max(classes):
        absent = next(number for number in range(max(classes)) if number not in classes)
        raise UsageError(
            f"{where} has labels up to {max(classes)} and nothing of class {absent}: number the classes without gaps, "
            "or set data.labels=false"
        )
    return torch.tensor(known, dtype=torch.int64), len(classes)


def tree_labels(
    names: Sequence[str], manifest: dict[str, int] | None, has_manifest: bool
) -> tuple[list[int | None] | None, tuple[str, ...]]:
    """Labels of files with relative ``names``, and the names of the classes where they have any.

    What ``dataset.json`` says counts. Without one the first folder on a file's path is its class, and files that lie in
    no folder have none; folders numbered as EDM's are no classes.
    """
    if has_manifest:
        return (None, ()) if manifest is None else ([manifest.get(name) for name in names], ())
    if all(_BUCKET.fullmatch(name) for name in names):
        return None, ()
    folders = [name.partition("/")[0] if "/" in name else None for name in names]
    return named_labels(folders)


def named_labels(words: Sequence[str | None]) -> tuple[list[int | None], tuple[str, ...]]:
    """Numbers for class names, in their alphabetical order."""
    class_names = tuple(sorted({word for word in words if word is not None}))
    number = {name: k for k, name in enumerate(class_names)}
    return [None if word is None else number[word] for word in words], class_names


def read_manifest(content: bytes, where: str) -> dict[str, int] | None:
    """The labels of a ``dataset.json`` by file name; None where it says that there are none."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is damaged: {error}") from error
    if not isinstance(document, dict) or "labels" not in document:
        raise UsageError(f'{where} has no "labels": it should be {{"labels": [["00000/img00000000.png", 0], ...]}}')
    pairs = document["labels"]
    if not pairs:
        return None
    labels: dict[str, int] = {}
    for pair in pairs.items() if isinstance(pairs, dict) else pairs if isinstance(pairs, list) else [pairs]:
        match pair:
            case [str(name), int(number)] if not isinstance(number, bool):
                labels[name] = number
            case _:
                raise UsageError(f"{where}: labels are pairs of a file name and a whole number, not {str(pair)[:80]}")
    return labels
