"""The house: imports go downwards only, light modules stay light, and a string becomes a class in few places."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewstep

ROOT = Path(fewstep.__file__).parent
MODULES = {
    ".".join(("fewstep", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "block",
        "compat",
        "conventions",
        "conversion",
        "condition",
        "errors",
        "files",
        "flow",
        "grids",
        "keys",
        "times",
        "uploads",
        "sources",
        "targets",
        "environment",
        "inert",
        "interrupts",
        "launch",
        "console",
        "precision",
    ),
    ("networks", "data", "sampling", "graphs", "evaluation.config", "networks.config", "networks.foreign.config"),
    ("checkpoint", "students.config", "teachers.config", "distill.times_config"),
    (
        "distill.config",
        "distill.progressive.config",
        "distill.flow_maps.config",
        "distill.consistency.config",
        "distill.reflow.config",
    ),
    ("config", "recipes", "comparison.config"),
    ("teachers", "students", "evaluation"),
    ("distill",),
    (
        "workflows",
        "doctor",
        "encode",
        "bench",
        "comparison",
    ),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""A module may import what lies in its own layer or in an earlier one."""

SEPARATE = {
    "evaluation": ("teachers", "students", "distill", "config"),
    "students": ("distill", "evaluation"),
    "teachers": ("students", "distill", "evaluation"),
    "networks": ("data", "sampling"),
    "data": ("networks", "sampling"),
    "sampling": ("networks", "data"),
}
"""Parts that do not see each other although the layers would let them."""

HEAVY = {"torch", "numpy", "matplotlib", "accelerate", "safetensors", "torchvision", "torchmetrics", "cleanfid", "PIL"}
OPTIONAL = {
    *("torchvision", "torchmetrics", "cleanfid", "tensorboard", "wandb", "pyarrow", "diffusers", "peft"),
    *("transformers", "prdc", "torch_fidelity", "sklearn", "threadpoolctl", "torchdiffeq", "tqdm"),
}


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it or only as it is imported itself."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.AST] = list(ast.walk(tree))
    if at_import_time:
        inside = {
            id(child)
            for node in nodes
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.walk(node)
        }
        nodes = [node for node in nodes if id(node) not in inside]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def place(module: str) -> tuple[int, str]:
    """The layer of a module, by its longest name in ``LAYERS``."""
    name = module.removeprefix("fewstep").removeprefix(".")
    found = [
        (len(entry), number, entry)
        for number, layer in enumerate(LAYERS)
        for entry in layer
        if name == entry or name.startswith(entry + ".")
    ]
    assert found, f"{module} has no place in the layers"
    return max(found)[1:]


def inner(module: str) -> list[str]:
    return [name for name in imports(MODULES[module]) if name.partition(".")[0] == "fewstep" and name != "fewstep"]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "fewstep"])
def test_imports_go_downwards(module: str) -> None:
    layer, _ = place(module)
    for name in inner(module):
        assert place(name)[0] <= layer, f"{module} imports {name} from above"


@pytest.mark.parametrize("part", SEPARATE)
def test_parts_that_do_not_see_each_other(part: str) -> None:
    for module in MODULES:
        top = module.removeprefix("fewstep.").partition(".")[0]
        if top != part:
            continue
        seen = {name.removeprefix("fewstep.").partition(".")[0] for name in inner(module)}
        assert not seen & set(SEPARATE[part]), module


def test_nobody_imports_the_command_line() -> None:
    importers = {module for module in MODULES if "fewstep.cli" in inner(module)}
    assert importers == {"fewstep.__main__"}


def closure(module: str) -> set[str]:
    """Every module that importing ``module`` imports, within the package and directly outside of it."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if name in MODULES:
            parents = [name.rpartition(".")[0]] if "." in name else []
            waiting += [*parents, *imports(MODULES[name], at_import_time=True)]
    return found


LIGHT = [
    *(name for name in MODULES if name.endswith(".config") or MODULES[name].name == "__init__.py"),
    *(
        "fewstep.cli",
        "fewstep.commands.shared",
        "fewstep.commands.bench.loader",
        "fewstep.commands.bench.metrics",
        "fewstep.commands.bench.network",
        "fewstep.commands.bench.objectives",
        "fewstep.commands.bench.plan",
        "fewstep.commands.bench.sample",
        "fewstep.commands.bench.shared",
        "fewstep.commands.bench.train",
        "fewstep.commands.compare",
        "fewstep.commands.data",
        "fewstep.commands.evaluate",
        "fewstep.bench.accelerators",
        "fewstep.block",
        "fewstep.errors",
        "fewstep.console",
        "fewstep.launch",
        "fewstep.interrupts",
    ),
    "fewstep.evaluation.bounds",
    "fewstep.evaluation.gates",
    "fewstep.evaluation.protocol",
    "fewstep.evaluation.results",
]


@pytest.mark.parametrize("module", [name for name in LIGHT if not name.startswith("fewstep.evaluation.report")])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    reached = {name.partition(".")[0] for name in closure(module)}
    assert not reached & HEAVY


@pytest.mark.parametrize("module", ["fewstep.evaluation.report", "fewstep.evaluation.goals"])
def test_the_report_needs_no_torch(module: str) -> None:
    reached = {name.partition(".")[0] for name in closure(module)}
    assert "fewstep" in reached
    assert "torch" not in reached


def test_what_may_be_broken_on_a_machine_is_imported_where_it_is_used() -> None:
    for module, path in MODULES.items():
        at_once = {name.partition(".")[0] for name in imports(path, at_import_time=True)}
        assert not at_once & OPTIONAL, module


def test_only_training_knows_accelerate() -> None:
    users = {
        module for module, path in MODULES.items() if "accelerate" in {name.partition(".")[0] for name in imports(path)}
    }
    assert users == {"fewstep.distill.train", "fewstep.distill.run", "fewstep.distill.trackers"}


def test_kinds_become_classes_through_literal_dictionaries() -> None:
    """No name is looked up in a module: from ``fewstep distill`` to the loss an editor can follow every call.
    A user's own code has no other address than its name; ``targets`` alone looks that up."""
    looked_up = {"getattr", "globals", "import_module", "__import__", "eval", "exec"}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        names |= {call.attr for call in calls if isinstance(call, ast.Attribute)} & {"import_module"}
        if module.split(".")[1:2] in (["distill"], ["students"], ["networks"], ["teachers"]):
            assert not names & looked_up, module


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fewstep.distill.plan", "PLANS"),
        ("fewstep.distill.flow_maps.methods", "METHODS"),
        ("fewstep.distill.consistency.methods", "METHODS"),
        ("fewstep.distill.trackers", "OPENS"),
        ("fewstep.networks.build", "NETWORKS"),
        ("fewstep.config", "TRAINS"),
        ("fewstep.data.load", "LOADS"),
        ("fewstep.data.load", "OPENS"),
        ("fewstep.data.detect", "CONFIGS"),
    ],
)
def test_each_table_of_kinds_is_written_out(module: str, name: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) == name
    )
    assert isinstance(table, ast.Dict)
    assert all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in table.keys)
    assert all(isinstance(value, (ast.Name, ast.Constant)) for value in table.values)


def test_the_tables_cover_the_same_objectives() -> None:
    from typing import get_args

    from fewstep.config import TRAINS
    from fewstep.distill.config import ObjectiveConfig
    from fewstep.distill.flow_maps.methods import METHODS
    from fewstep.distill.plan import PLANS

    kinds = {block.model_fields["kind"].default for block in get_args(get_args(ObjectiveConfig)[0])}
    assert kinds == set(PLANS) == set(TRAINS)
    assert set(METHODS) == {kind for kind, stages in PLANS.items() if stages is PLANS["meanflow"]}
