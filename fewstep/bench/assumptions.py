"""What a plan takes for granted, in sentences."""

from fewstep.bench.accelerators import Accelerator
from fewstep.bench.outline import Outline
from fewstep.distill.reflow.config import ReflowConfig


def assumptions(
    case: Outline, accelerator: Accelerator, gpus: int, *, efficiency: float, reserve: float, cpu: bool
) -> tuple[str, ...]:
    """Everything that a plan of this run rests on and has not measured, one sentence each."""
    train, tf32 = case.config.train, case.config.products == "tf32"
    found = [
        f"products reach {efficiency:g} of the peak ({_peaks(accelerator, tf32)}); measure it and give --efficiency",
        "kernels run one after the other: products, and between them what reads and writes memory at its full "
        "bandwidth; launches go on meanwhile, and the optimiser follows",
        "which networks a step calls, on how many rows, was observed on networks of few weights, in four steps of each "
        "stage; operations, traffic and memory are those of the run's own networks, gone through without numbers",
        "operations are those of matrix products and convolutions, recomputation in attention's backward pass included",
        "noise, times and the loss itself are not counted, nor evaluation, checkpoints and waiting for data",
        f"{reserve:.0%} of a GPU's memory is left to its context, libraries and gaps; the data are elsewhere",
    ]
    if not cpu:
        found.append("every operation takes 6 us to be launched, and attention is a fused kernel")
    if train.compile:
        found.append(
            "compiled, what lies between products takes no time; launches and memory are those of eager mode: upper "
            "bounds"
        )
    else:
        found.append("eager mode: every kernel reads and writes memory, whatever a cache may keep")
    if tf32:
        lets = f"as train.precision {train.precision} lets them"
        found.append(f"products and convolutions of float32 (of forward derivatives always) run in TF32, {lets}")
    else:
        asked = "train.precision fp32" if train.precision == "fp32" else "a difference of close outputs"
        found.append(f"products and convolutions of float32 run without TF32, as {asked} asks")
    if gpus > 1:
        found.append(f"all {gpus} GPUs are one node, and each sends {accelerator.link:g} GB/s to the others")
        if train.parallel == "ddp":
            found.append("DDP: one ring all-reduce, hidden behind the backward pass as far as that is long enough")
        else:
            found.append(
                "FSDP2: every call gathers its network, the backward pass once more, gradients are scattered once; "
                "hidden behind the arithmetic as far as that is long enough; the teacher is whole on every GPU"
            )
            if train.precision == "bf16":
                found.append(
                    "autocast's bfloat16 copies of the gathered weights live until the backward pass: they are counted "
                    "as activations, and are not sharded"
                )
    if train.optimizer == "radam":
        found.append("what RAdam's step holds for itself (a few copies of the weights) is not counted")
    if isinstance(case.config.objective, ReflowConfig) and case.config.objective.pairs.path is None:
        pairs = case.config.objective.pairs
        made = f"{pairs.count:,} pairs, of {pairs.steps} {pairs.solver} steps each"
        found.append(f"{made}, are made before every stage: not in the hours")
    return (*found, *case.assumed)


def _peaks(accelerator: Accelerator, tf32: bool) -> str:
    full = f"{accelerator.tf32:,.4g} in TF32" if tf32 else f"{accelerator.fp32:,.4g} in float32"
    return f"{accelerator.bf16:,.4g} TFLOP/s in bfloat16, {full}"
