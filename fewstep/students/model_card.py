"""The README.md that travels with an exported model."""

from collections.abc import Mapping
from typing import Any


def model_readme(card: Mapping[str, Any], sampler: Mapping[str, Any]) -> str:
    """A short page: what the model is, for which steps, and how to sample it."""
    steps = sorted(int(count) for count in sampler["steps"])
    if card["role"] == "teacher":
        serves = "a velocity field; any number of solver steps"
    elif steps == [0]:
        serves = "any number of steps"
    else:
        serves = "exactly " + ", ".join(str(count) for count in steps) + " steps"
    guidance = card["guidance"]
    lines = [
        f"# {card['name']}",
        "",
        f"- role: {card['role']}, objective: {card['objective']}",
        f"- serves: {serves}",
        f"- data: {card['data']['name']}, shape {card['data']['shape']}, {card['data']['num_classes']} classes",
        f"- convention: {card['convention']}",
        f"- guidance: {'none' if guidance == 1 else f'{guidance:g}, built in: do not guide again'}",
        f"- teacher: {card['teacher'] or 'none'}",
        f"- weights: exponential moving average ({card['ema']}); {card['params']:,} parameters",
        f"- training: {card['train']['steps']:,} steps, {card['train']['samples']:,} samples",
        "",
        "```",
        f"fewstep sample RUN --steps {steps[0] or (64 if card['role'] == 'teacher' else 4)} --n 64",
        "```",
        "",
    ]
    return "\n".join(lines)
