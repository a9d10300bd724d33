"""`fewstep bench`: measure fewstep itself."""

import typer

from fewstep.commands.bench.loader import bench_loader
from fewstep.commands.bench.metrics import bench_metrics
from fewstep.commands.bench.network import bench_network
from fewstep.commands.bench.objectives import bench_objectives
from fewstep.commands.bench.plan import bench_plan
from fewstep.commands.bench.sample import bench_sample
from fewstep.commands.bench.train import bench_train

bench_app = typer.Typer(no_args_is_help=True, help="Measure fewstep itself.", rich_markup_mode=None)
bench_app.command("train")(bench_train)
bench_app.command("network")(bench_network)
bench_app.command("objectives")(bench_objectives)
bench_app.command("loader")(bench_loader)
bench_app.command("metrics")(bench_metrics)
bench_app.command("plan")(bench_plan)
bench_app.command("sample")(bench_sample)
