"""FloT on paper: the table of `docs/speed.md`. `python benchmarks/plan_table.py [--gpu h100] [--objective meanflow]`.

A training of 400,000 steps of 256 samples in bfloat16, not compiled: on one GPU, and sharded by FSDP2 on eight.
"""

import argparse

from fewstep.bench.accelerators import accelerator
from fewstep.bench.outline import outline
from fewstep.bench.plan import Plan, make_plan
from fewstep.bench.plan_memory import GIB
from fewstep.config import RunConfig, check_config

SIZES = ("flot-small", "flot-base", "flot-large", "flot-xl")
SHAPES = {"3x32x32": ((3, 32, 32), 10), "latent 4x32x32": ((4, 32, 32), 1000), "3x64x64": ((3, 64, 64), 1000)}
STEPS, BATCH = 400_000, 256


def run(size: str, objective: str, parallel: str, microbatches: int) -> RunConfig:
    kind = "velocity" if objective == "flow_matching" else "average_velocity"
    block = {"kind": objective} if objective == "flow_matching" else {"kind": objective, "velocity": "data"}
    return check_config(
        {
            "name": size,
            "data": {"kind": "digits"},  # their shape is given
            "student": {"kind": kind, "init": "scratch", "network": {"size": size}},
            "objective": block,
            "train": {
                "steps": STEPS,
                "batch_size": BATCH,
                "precision": "bf16",
                "parallel": parallel,
                "ema": [0.9999],
                "gradient_accumulation_steps": microbatches,
            },
        },
        size,
    )


def planned(size: str, shape: str, objective: str, gpu: str, gpus: int) -> Plan:
    """With as few microbatches as fit."""
    parallel = "fsdp2" if gpus > 1 else "ddp"
    microbatches = 1
    while True:
        config = run(size, objective, parallel, microbatches)
        plan = make_plan(outline(config, *SHAPES[shape]), gpus, accelerator(gpu))
        if plan.fits or microbatches * gpus == BATCH:
            return plan
        microbatches *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--objective", default="flow_matching")
    options = parser.parse_args()
    print(
        "| network | samples | parameters | GFLOP forward, step | GPUs | at once, most | GiB each | samples/s | hours |"
    )
    print("|:--|:--|--:|--:|--:|--:|--:|--:|--:|")
    for shape in SHAPES:
        for size in SIZES:
            for gpus in (1, 8):
                plan = planned(size, shape, options.objective, options.gpu, gpus)
                cells = (
                    size,
                    shape,
                    f"{plan.params / 1e6:,.1f} M",
                    f"{plan.forward_flops / 1e9:,.1f}, {plan.stages[0].flops / 1e9:,.1f}",
                    str(gpus),
                    f"{plan.microbatch}, {plan.largest}",
                    f"{plan.memory.total / GIB:.1f}",
                    f"{plan.samples_per_s:,.0f}",
                    f"{plan.hours:,.1f}",
                )
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
