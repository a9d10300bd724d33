"""The README.md that travels with an exported model."""

from collections.abc import Mapping
from typing import Any


def model_readme(card: Mapping[str, Any], sampler: Mapping[str, Any]) -> str:
    """A short page: what the model is, for which steps, and how to sample it."""
    steps = sorted(int(count) for count in sampler["steps"])
    if card["role"] == "teacher":
        serves = "a velocity field; any number of solver steps"
    elif steps[0] == 0:
        exact = ", ".join(str(count) for count in steps[1:])
        serves = "any number of steps" + (f"; a network of its own for {exact}" if exact else "")
    elif any(entry.get("multiples") for entry in sampler["steps"].values()):
        serves = ", ".join(str(count) for count in steps) + " steps and multiples"
    else:
        serves = "exactly " + ", ".join(str(count) for count in steps) + " steps"
    lines = [
        f"# {card['name']}",
        "",
        f"- role: {card['role']}, objective: {card['objective']}",
        f"- serves: {serves}",
        f"- data: {card['data']['name']}, shape {card['data']['shape']}, {card['data']['num_classes']} classes",
        f"- convention: {card['convention']}",
        *_noise(card),
        f"- guidance: {_guidance(card)}",
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


def _guidance(card: Mapping[str, Any]) -> str:
    if card.get("guidance_input"):
        return "an input of the network (`--guidance 2.5 --window 0.1,0.8`), off unless it is given"
    scale = card["guidance"]
    return "none" if scale == 1 else f"{scale:g}, built in: do not guide again"


def _noise(card: Mapping[str, Any]) -> list[str]:
    """Lines on what is not Gaussian noise independent of the data, learned without bias."""
    noise, lines = card.get("noise", {}), []
    coupling = noise.get("coupling", {}).get("kind", "independent")
    if noise.get("source", "gaussian") != "gaussian":
        lines.append(f"- noise: {noise['source']} (samples start from it)")
    if coupling != "independent":
        lines.append(
            f"- pairs of noise and data: {coupling}, in groups of {noise['group_size']}; re-noising leaves the flow"
        )
    if card.get("contrast"):
        lines.append(f"- contrastive, weight {card['contrast']:g}: biased unless corrected, as it is when it teaches")
    return lines
