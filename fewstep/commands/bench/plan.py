"""`fewstep bench plan`: what a run would cost on other machines."""

from typing import Annotated

import typer

from fewstep.commands.bench.shared import shape_of
from fewstep.commands.shared import AsJson, Config, Overrides, user_errors
from fewstep.console import emit_json, say, stderr
from fewstep.errors import UsageError


def bench_plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs of one node.")] = 1,
    gpu: Annotated[str, typer.Option("--gpu", help="Their kind, by its data sheet.")] = "h100",
    measured: Annotated[bool, typer.Option("--measured", help="Measure this machine's peaks and take them.")] = False,
    efficiency: Annotated[
        float | None, typer.Option("--efficiency", help="Share of the peak that products reach (default 0.5).")
    ] = None,
    device_peak: Annotated[
        float | None, typer.Option("--device-peak", min=1e-6, help="TFLOP/s of products, in the place of all peaks.")
    ] = None,
    link: Annotated[float | None, typer.Option("--link", min=1e-6, help="GB/s that a GPU sends to the others.")] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Shape of a sample where the data are not here: C,H,W.")
    ] = None,
    classes: Annotated[int | None, typer.Option("--classes", min=0, help="Classes, with --shape.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a run would cost on GPUs that are not here: operations, memory by part, time of a step, hours.

    Nothing is started and no GPU is needed; data and teacher need not be there if shape and networks are told. Every
    assumption is printed. Sizes and memory are counted, times are a model.

    Example: fewstep bench plan cifar10-teacher train.batch_size=1024 --gpus 8 --shape 3,32,32 --classes 10
    """
    with user_errors():
        from fewstep.bench.accelerators import accelerator, overridden
        from fewstep.config import load_config

        if efficiency is not None and not 0 < efficiency <= 1:
            raise UsageError(f"--efficiency lies above 0 and up to 1, got {efficiency:g}")
        if classes is not None and shape is None:
            raise UsageError("--classes goes with --shape")
        settings = load_config(config, overrides or [])
        sample = None if shape is None else shape_of(shape)
        cpu = False
        if measured:
            from fewstep.bench.ceiling import measured_accelerator
            from fewstep.workflows import default_device

            device = default_device()
            cpu = device.type == "cpu"
            kind = overridden(measured_accelerator(device), peak_tflops=device_peak, link=link)
        else:
            kind = accelerator(gpu, peak_tflops=device_peak, link=link)

        from fewstep.bench.outline import outline
        from fewstep.bench.plan import EFFICIENCY, make_plan
        from fewstep.bench.plan_tables import plan_table, plan_title, verdict

        plan = make_plan(
            outline(settings, sample, classes),
            gpus,
            kind,
            efficiency=EFFICIENCY if efficiency is None else efficiency,
            cpu=cpu,
        )
        say(plan_title(plan))
        stderr().print(plan_table(plan))
        say(verdict(plan))
        say("taken for granted:")
        for each in plan.assumptions:
            say(f"  - {each}")
        if as_json:
            emit_json(plan.to_json())
