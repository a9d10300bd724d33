"""A plan for people."""

from dataclasses import asdict

from rich.table import Table

from fewstep.bench.plan import RESERVE, Plan
from fewstep.bench.plan_memory import GIB

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "the optimiser's moments",
    "averages": "averages",
    "teachers": "teachers",
    "held": "targets, the stage before",
    "exchange": "exchange",
    "activations": "activations",
}


def plan_title(plan: Plan) -> str:
    """What is planned."""
    shape = " x ".join(map(str, plan.shape))
    shared = "" if plan.gpus == 1 else f", {plan.parallel}"
    return (
        f"{plan.name} ({plan.objective}): samples of {shape}, {plan.classes} classes, {plan.precision}, on {plan.gpus} "
        f"{plan.accelerator.name}{shared}"
    )


def plan_table(plan: Plan) -> Table:
    """Size, memory and time in one column each of names and values."""
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("parameters", f"{plan.params:,}")
    table.add_row("GFLOP of a forward pass, per sample", f"{plan.forward_flops / 1e9:,.3f}")
    for stage in plan.stages:
        ratio = stage.flops / plan.forward_flops
        table.add_row(
            f"GFLOP of a step, per sample{_of(plan, stage.name)}", f"{stage.flops / 1e9:,.3f} ({ratio:.2f} x)"
        )
    table.add_section()
    memory = plan.memory
    unit, size_of = ("GiB", GIB) if memory.total >= GIB else ("MiB", GIB / 1024)
    for part, size in asdict(memory).items():
        if size:
            table.add_row(f"{unit} of {_PARTS[part]}", f"{size / size_of:,.2f}")
    table.add_row(f"{unit} in all, on each GPU", f"{memory.total / size_of:,.2f}")
    table.add_row("samples a GPU takes at once", f"{plan.microbatch:,}")
    if plan.largest is not None:
        table.add_row("most that fit", f"{plan.largest:,}")
    table.add_section()
    for stage in plan.stages:
        bounds = {
            "products": stage.products_s,
            "memory traffic between products": stage.traffic_s,
            "launches, beside both": stage.launches_s,
        }
        for name, seconds in bounds.items():
            table.add_row(f"ms of {name}{_of(plan, stage.name)}", f"{1e3 * seconds:,.2f}")
        if plan.gpus > 1:
            table.add_row(f"ms of exchange that is not hidden{_of(plan, stage.name)}", f"{1e3 * stage.exchange_s:,.2f}")
        table.add_row(f"ms of the optimiser{_of(plan, stage.name)}", f"{1e3 * stage.optimiser_s:,.2f}")
        table.add_row(f"ms of a step{_of(plan, stage.name)}", f"{1e3 * stage.step_s:,.2f}")
    table.add_section()
    steps = sum(stage.steps for stage in plan.stages)
    table.add_row("share of the peak reached", f"{plan.utilisation:.1%}")
    table.add_row("samples per second", f"{plan.samples_per_s:,.0f}")
    table.add_row(f"hours for {steps:,} steps of {plan.batch_size:,}", f"{plan.hours:,.3g}")
    table.add_row("GPU-hours", f"{plan.hours * plan.gpus:,.3g}")
    return table


def verdict(plan: Plan) -> str:
    """Whether it fits."""
    needed, there = plan.memory.total / GIB, plan.capacity / GIB
    if plan.fits:
        return f"fits: {needed:.1f} GiB of {there:.0f} GiB"
    left = f"{RESERVE:.0%} of which are left free"
    if not plan.largest:
        return f"does not fit: {needed:.1f} GiB of {there:.0f} GiB ({left}), and no sample at once would"
    return (
        f"does not fit: {needed:.1f} GiB of {there:.0f} GiB ({left}); {plan.largest:,} samples at once would: "
        f"lower train.batch_size or raise train.gradient_accumulation_steps"
    )


def _of(plan: Plan, stage: str) -> str:
    return f", {stage}" if len(plan.stages) > 1 else ""
