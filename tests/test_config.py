"""The config tree: round trips, overrides, and what each mistake says."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import cli, refuse, succeed

from fewstep.config import RunConfig, config_changes, config_yaml, load_config, recipe_names
from fewstep.errors import UsageError

TOY = """\
# A toy.
name: toy
data: {kind: toy, name: mixture}
teacher: {kind: analytic}
student: {kind: average_velocity, init: scratch, network: {kind: mlp, width: 16, depth: 1}}
objective: {kind: meanflow}
"""


STUDENT = """\
# A student whose every block is written out, whatever the recipes say today.
name: student
data: {kind: digits}
teacher: {kind: run, path: runs/digits-teacher}
student: {kind: average_velocity, init: teacher, network: {kind: mlp, width: 16}}
objective: {kind: meanflow, velocity: data, times: {kind: logit_normal, mean: 0.0}}
train: {steps: 10, lr: 1.0e-3, ema: [0.9]}
evaluate: {steps: [1, 2]}
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(TOY)
    return path


def test_a_file_and_overrides_become_one_config(toy: Path) -> None:
    config = load_config(str(toy), ["train.steps=7", "train.lr=1e-2", "objective.times={kind: uniform}", "seed=5"])
    assert (config.train.steps, config.train.lr, config.seed) == (7, 0.01, 5)  # YAML reads 1e-2 as text
    assert config.objective.times.kind == "uniform"  # type: ignore[union-attr]
    assert config.train.batch_size == load_config(str(toy)).train.batch_size


def test_an_override_reaches_into_a_block_that_the_file_leaves_out(toy: Path) -> None:
    assert load_config(str(toy), ["evaluate.steps=[3, 5]"]).evaluate.steps == (3, 5)


def test_an_override_keeps_the_rest_of_a_default_block(toy: Path) -> None:
    default = load_config(str(toy)).objective.times  # type: ignore[union-attr]
    changed = load_config(str(toy), ["objective.times.std=0.25"]).objective.times  # type: ignore[union-attr]
    assert changed == default.model_copy(update={"std": 0.25})
    assert default.std != 0.25
    other = load_config(str(toy), ["objective.times.kind=uniform"]).objective.times  # type: ignore[union-attr]
    assert other.kind == "uniform"


@pytest.mark.parametrize(
    "overrides", [(), ("train.lr=1e-05", "train.betas=[0, 0.5]", "train.ema=[0.9, 0.99]", "seed=9")]
)
@pytest.mark.parametrize("name", recipe_names())
def test_yaml_round_trip(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = load_config(name, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml(config))
    again = load_config(str(path))
    assert again == config
    assert config_yaml(again) == config_yaml(config)


def test_unicode_survives_the_round_trip(toy: Path, tmp_path: Path) -> None:
    config = load_config("digits-meanflow", ["teacher.path=läufe/lehrer 教"])
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml(config))
    assert "教" in path.read_text()
    assert load_config(str(path)) == config


def test_changes_are_named_by_their_place(toy: Path) -> None:
    old, new = load_config(str(toy)), load_config(str(toy), ["train.steps=7", "evaluate.steps=[1, 2]"])
    assert config_changes(old, old) == []
    assert config_changes(old, new) == [
        f"train.steps was {old.train.steps} and is 7",
        "evaluate.steps.2 was 4 and is None",
        "evaluate.steps.3 was 8 and is None",
    ]


def test_a_recipe_says_what_differs_from_a_bare_config(toy: Path) -> None:
    """Not everything is a default: a round trip that dropped the objective's settings would be noticed."""
    assert config_changes(load_config(str(toy)), load_config(str(toy), ["objective.jump_fraction=0.125"]))


# What a mistake says -------------------------------------------------------------------------------------------------

OVERRIDES = {
    "unknown key at top level": ("trian.steps=3", ["trian", "did you mean 'train'?"]),
    "unknown key in a block": ("train.step=3", ["train.step", "did you mean 'steps'?"]),
    "unknown key far from all": ("train.zzz=3", ["train.zzz", "known: ", "batch_size"]),
    "unknown key two blocks down": ("student.network.widht=3", ["student.network.widht", "did you mean 'width'?"]),
    "unknown key in a union": ("objective.jump_fractoin=1", ["objective.jump_fractoin", "'jump_fraction'"]),
    "unknown key in a union in a union": ("objective.times.meen=1", ["objective.times.meen", "'mean'"]),
    "wrong type": ("train.steps=many", ["train.steps", "integer", "'many'"]),
    "a fraction of a step": ("train.steps=0.5", ["train.steps", "integer", "0.5"]),
    "a block instead of a number": ("train.steps={a: 1}", ["train.steps", "integer"]),
    "a number instead of a block": ("train=5", ["train", "5"]),
    "null instead of a block": ("train=null", ["train", "None"]),
    "a word instead of a union": ("data=digits", ["data", "'digits'"]),
    "wrong kind": ("objective.kind=meanfow", ["objective.kind", "meanfow", "did you mean 'meanflow'?"]),
    "wrong kind of data": ("data.kind=toys", ["data.kind", "toys", "did you mean 'toy'?"]),
    "a list as kind": ("data.kind=[toy]", ["data"]),
    "wrong literal": ("train.precision=fp64", ["train.precision", "'fp32', 'tf32' or 'bf16'", "'fp64'"]),
    "negative": ("train.lr=-1", ["train.lr", "greater than 0", "-1"]),
    "zero steps": ("train.steps=0", ["train.steps", "0"]),
    "not a number": ("train.lr=.nan", ["train.lr"]),
    "infinite": ("train.lr=.inf", ["train.lr", "finite"]),
    "infinite as text": ("objective.times.mean=-inf", ["objective.times.mean", "finite"]),
    "negative seed": ("seed=-1", ["seed", "-1"]),
    "a seed beyond 64 bits": ("seed=123456789012345678901234567890", ["seed", "less than"]),
    "empty list": ("train.ema=[]", ["train.ema", "at least 1"]),
    "an entry of a list": ("evaluate.steps=[1, 0]", ["evaluate.steps.1", "0"]),
    "momentum beyond 1": ("train.betas=[0.9, 2]", ["train.betas", "[0, 1)", "2.0"]),
    "no equals sign": ("train.steps", ["'train.steps'", "key=value", "train.steps=100"]),
    "no key": ("=3", ["'=3'", "key=value"]),
    "below a value": ("name.first=x", ["name.first", "name is a value"]),
    "below a list": ("train.ema.0=0.5", ["train.ema.0", "ema is a value"]),
    "not YAML": ("name=[1", ["name", "'[1'", "YAML"]),
    "an impossible date": ("name=2020-13-45", ["name", "2020-13-45"]),
    "empty name": ("name=", ["name", "string"]),
    "empty text as name": ("name=''", ["name", "''"]),
    "name with a slash": ("name=../runs", ["name", "'../runs'"]),
    "name that is a number": ("name=3", ["name", "string", "3"]),
    "student of another objective": ("student.kind=consistency", ["meanflow", "average_velocity", "consistency"]),
    "no teacher to start from": ("teacher=null", ["teacher"]),
    "no network to start from scratch": ("student={kind: average_velocity, init: scratch}", ["student.network"]),
    "teacher without weights": ("teacher={kind: analytic}", ["analytic", "student.init scratch"]),
    "microbatches of unequal size": (
        "train={batch_size: 10, gradient_accumulation_steps: 4}",
        ["train: ", "batch_size 10", "into 4"],
    ),
    "the same average twice": ("train.ema=[0.9, {kind: constant, decay: 0.9}]", ["train", "twice", "0.9, 0.9"]),
    "snapshots of one average": (
        "train={ema: [0.9, {kind: power}], ema_snapshot_every: 2}",
        ["train", "ema_snapshot_every", "two averages of kind power"],
    ),
    "momentum of 1": ("train.betas=[1, 0.9]", ["train.betas", "[0, 1)"]),
    "a grid that does not double": (
        "objective={kind: consistency, start_nodes: 4, nodes: 12}",
        ["objective", "nodes 12", "start_nodes 4", "power of two"],
    ),
    "a grid that is no multiple": ("objective={kind: consistency, start_nodes: 3, nodes: 8}", ["nodes 8", "3"]),
    "a guided teacher that is not asked": ("teacher.guidance=2", ["teacher.guidance", "velocity data"]),
    "an unknown second time": ("student.second_time=split", ["student.second_time", "'gap' or 'layers'", "'split'"]),
    "all layers early": (
        "student={kind: average_velocity, second_time: layers, early_layers: 1}",
        ["student.early_layers", "less than 1", "got 1"],
    ),
    "early layers by gap": ("student.early_layers=0.5", ["student: ", "early_layers", "second_time layers"]),
    # The flow-map family.
    "a misspelt method": ("objective.kind=alphaflow", ["objective.kind", "did you mean 'alpha_flow'?"]),
    "a misspelt weight": ("objective.weight.kind=hubr", ["objective.weight.kind", "did you mean 'huber'?"]),
    "a misspelt weight in a block": (
        "objective.weight={kind: logvariance}",
        ["objective.weight.kind", "did you mean 'log_variance'?"],
    ),
    "a setting of another weight": (
        "objective.weight={kind: huber, power: 1}",
        ["objective.weight.power", "unknown key", "scale"],
    ),
    "a power beyond 2": ("objective.weight={kind: power, power: 3}", ["objective.weight.power", "2", "3"]),
    "misspelt pairs": ("objective.times={kind: gaps}", ["objective.times.kind", "did you mean 'gap'?"]),
    "a setting two blocks down": (
        "objective.times={kind: gap, gap: {kind: logit_normal, meen: 1}}",
        ["objective.times.gap.meen", "did you mean 'mean'?"],
    ),
    "an empty window": ("objective.guidance={low: 0.8, high: 0.2}", ["objective.guidance", "[0.8, 0.2]", "empty"]),
    "a window beyond 1": ("objective.guidance={high: 1.5}", ["objective.guidance.high", "1.5"]),
    "no scale": ("objective.guidance={scale: 0}", ["objective.guidance.scale", "0"]),
    "a mix of 1": ("objective.guidance={mix: 1}", ["objective.guidance.mix", "1"]),
    "scales without an input for them": (
        "objective.guidance={largest: 8}",
        ["objective.guidance.largest", "student.guidance_input true"],
    ),
    "no scales to draw from": (
        "objective.guidance={scale: 3, largest: 3}",
        ["objective.guidance", "largest 3", "not above scale 3"],
    ),
    "an input without guidance": ("student.guidance_input=true", ["student.guidance_input", "objective.guidance"]),
    "an alpha that ends before it begins": (
        "objective={kind: alpha_flow, begin: 0.5, end: 0.5}",
        ["objective", "begin 0.5", "not before end 0.5"],
    ),
    "a modulation that ends before it begins": (
        "objective={kind: modular_meanflow, begin: 0.6, end: 0.5}",
        ["objective", "begin 0.6", "after end 0.5"],
    ),
    "a step that grows": ("objective={kind: soflow, last: 0.5}", ["objective", "first 0.1", "last 0.5", "shrink"]),
    "a warm start of nothing": ("objective.warm_start={steps: 0}", ["objective.warm_start.steps", "0"]),
    "a warm start without a length": ("objective.warm_start={nodes: 4}", ["objective.warm_start.steps", "required"]),
    "a trajectory of one node": ("objective={kind: trajectory, nodes: 1}", ["objective.nodes", "2", "1"]),
    "a warm start of a warm start": (
        "objective={kind: trajectory, warm_start: {steps: 2}}",
        ["objective.warm_start"],
    ),
    "flow from data alone": ("objective={kind: align_your_flow, velocity: data}", ["objective.velocity", "'teacher'"]),
    "an unknown solver": ("objective={kind: trajectory, solver: rk4}", ["objective.solver", "'heun'", "'rk4'"]),
}

TEACHERS = {
    "two times": ("student.second_time=layers", ["student: ", "second_time layers", "students", "one time"]),
    "guidance as an input": ("student.guidance_input=true", ["student: ", "guidance_input", "students"]),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_wrong_override_is_one_sentence(case: str, tmp_path: Path) -> None:
    override, words = OVERRIDES[case]
    path = tmp_path / "student.yaml"
    path.write_text(STUDENT)
    refuse("distill", path, override, "--out", tmp_path / "run", says=tuple(words))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("case", TEACHERS)
def test_what_is_for_students_alone(case: str, tmp_path: Path) -> None:
    override, words = TEACHERS[case]
    refuse("teach", "digits-teacher", override, "--out", tmp_path / "run", says=("digits-teacher: ", *words))
    assert not (tmp_path / "run").exists()


def test_a_student_s_second_time_and_guidance() -> None:
    student = load_config("digits-meanflow").student
    assert (student.split, student.guidance_input, student.two_times) == (None, False, True)
    told = ["student.guidance_input=true", "objective.guidance={scale: 1.0, largest: 4.0}"]
    overrides = ["student.second_time=layers", *told]
    student = load_config("digits-meanflow", overrides).student
    assert (student.split, student.guidance_input) == (0.7, True)
    assert load_config("digits-meanflow", [*overrides, "student.early_layers=0.25"]).student.split == 0.25
    assert not load_config("digits-teacher").student.two_times


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    line = refuse("distill", "digits-meanflow", f"train.steps={'x' * 5000}", says=("train.steps",))
    assert len(line) < 300


FILES = {
    "a list": ("- name: x\n- seed: 1\n", ["not a mapping"]),
    "a word": ("hello\n", ["not a mapping"]),
    "nothing": ("", ["not a mapping"]),
    "not YAML": ("name: [x\nseed: 1\n", ["not valid YAML", "line"]),
    "tabs": ("name: x\n\tseed: 1\n", ["not valid YAML", "line 2"]),
    "a Python object": ("name: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),
    "missing required key": (TOY.replace("name: toy\n", ""), ["name", "required"]),
    "missing required block": (TOY.replace("objective: {kind: meanflow}\n", ""), ["objective", "required"]),
    "missing kind": (TOY.replace("{kind: meanflow}", "{jump_fraction: 1}"), ["objective", "needs a kind"]),
    "missing key of a union": (TOY.replace(", name: mixture}", "}"), ["data.name", "required"]),
    "a key that is a number": (TOY + "3: 4\n", ["3"]),
    "unknown toy": (TOY.replace("mixture", "mixtures"), ["data.name", "'mixtures'"]),
    "itself inside": ("name: &a [*a]\n", ["name"]),
    "a progressive student without teacher": (
        TOY.replace("teacher: {kind: analytic}\n", "").replace("meanflow", "progressive"),
        ["objective progressive needs a teacher"],
    ),
    "a velocity without teacher": (
        TOY.replace("teacher: {kind: analytic}\n", ""),
        ["objective meanflow needs a teacher"],
    ),
    "snapshots over several stages": (
        TOY.replace("meanflow", "progressive")
        + "train: {steps: 1, ema: [{kind: power}, {kind: power, relative_std: 0.05}], ema_snapshot_every: 2}\n",
        ["train.ema_snapshot_every", "stages"],
    ),
    "snapshots after a warm start": (
        TOY.replace("kind: meanflow", "kind: meanflow, warm_start: {steps: 1}")
        + "train: {steps: 2, ema: [{kind: power}, {kind: power, relative_std: 0.05}], ema_snapshot_every: 2}\n",
        ["train.ema_snapshot_every", "stages", "warm start"],
    ),
    "two guides": (
        TOY.replace("kind: analytic", "kind: analytic, guidance: 2").replace(
            "kind: meanflow", "kind: meanflow, guidance: {scale: 2}"
        ),
        ["objective.guidance and teacher.guidance exclude each other"],
    ),
    "guidance as input of a method without it": (
        TOY.replace("kind: average_velocity", "guidance_input: true, kind: average_velocity").replace(
            "meanflow", "free_flow"
        ),
        ["student.guidance_input", "free_flow"],
    ),
    **{
        f"{kind} without teacher": (
            TOY.replace("teacher: {kind: analytic}\n", "").replace("kind: meanflow", f"kind: {kind}"),
            [f"objective {kind.partition(',')[0]} needs a teacher"],
        )
        for kind in (
            "split_meanflow",
            "align_your_flow",
            "free_flow",
            "trajectory",
            "terminal_velocity, velocity: teacher",
            "shortcut, velocity: teacher",
            "meanflow, velocity: data, warm_start: {steps: 1}",
        )
    },
    "a teacher of a teacher": (
        TOY.replace("meanflow", "flow_matching").replace("average_velocity", "velocity"),
        ["flow_matching", "takes no teacher"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_one_sentence(case: str, tmp_path: Path) -> None:
    text, words = FILES[case]
    path = tmp_path / "own.yaml"
    path.write_text(text)
    refuse("distill", path, "--out", tmp_path / "run", says=(str(path), *words))
    assert [path] == list(tmp_path.iterdir())


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    refuse("teach", tmp_path / "none.yaml", says=("no config file", "none.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe\n")
    refuse("teach", tmp_path / "bytes.yaml", says=("bytes.yaml", "UTF-8"))
    (tmp_path / "folder.yaml").mkdir()
    refuse("teach", tmp_path / "folder.yaml", says=("folder.yaml", "directory"))


def test_a_recipe_that_does_not_exist() -> None:
    refuse("teach", "digits-techer", says=("'digits-techer'", "did you mean 'digits-teacher'?"))
    refuse("distill", "zzz", says=("'zzz'", "known: ", *recipe_names()))
    refuse("distill", "", says=("known: ",))
    refuse("recipes", "show", "digits-meanflo", says=("did you mean 'digits-meanflow'?",))
    refuse("recipes", "show", "../recipes/digits-meanflow", says=("no recipe",))
    assert cli("distill", "x" * 5000).exit_code == 2


def test_the_right_command_for_a_config(tmp_path: Path) -> None:
    refuse("distill", "digits-teacher", says=("digits-teacher", "`fewstep teach`"))
    refuse("teach", "digits-meanflow", says=("digits-meanflow", "`fewstep distill`"))


def test_the_first_fault_reported_is_the_unknown_key(toy: Path) -> None:
    """``init`` misspelt falls back to the default, which then lacks a teacher's weights: the cause is named."""
    toy.write_text(TOY.replace("init: scratch", "innit: scratch"))
    with pytest.raises(UsageError, match=r"student\.innit.*did you mean 'init'"):
        load_config(str(toy))


@pytest.mark.parametrize("kind", ["improved_meanflow", "modular_meanflow", "alpha_flow", "soflow", "shortcut"])
def test_a_method_of_data_needs_no_teacher(kind: str, toy: Path) -> None:
    toy.write_text(TOY.replace("teacher: {kind: analytic}\n", "").replace("kind: meanflow", f"kind: {kind}"))
    assert load_config(str(toy)).teacher is None


# --dry-run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_dry_run_prints_the_resolved_config_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "teach" if load_config(name).objective.kind == "flow_matching" else "distill"
    printed = succeed(command, name, "train.steps=11", "--seed", 3, "--dry-run").stdout
    document = json.loads(succeed(command, name, "train.steps=11", "--seed", 3, "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    config = load_config(name, ["train.steps=11", "seed=3"])
    assert RunConfig.model_validate(yaml.safe_load(printed)) == config
    assert RunConfig.model_validate(document) == config


def test_another_kind_leaves_behind_what_only_the_old_one_has() -> None:
    """In whatever order it is written; what the user gives for it counts, and a key that it lacks is still an error."""
    config = load_config("images-teacher", ["data.path=somewhere", "data.kind=shards", "data.max_images=5"])
    assert (config.data.kind, config.data.path, config.data.max_images) == ("shards", "somewhere", 5)
    assert config.data.flip
    assert load_config("digits-teacher", ["objective.times.kind=uniform"]).objective.times.model_dump() == {
        "kind": "uniform",
        "shift": 1.0,
    }
    assert load_config("images-teacher", ["student.network.kind=mlp"]).student.network.kind == "mlp"
    refuse("teach", "images-teacher", "data.size=8", "data.kind=shards", "--dry-run", says=("data.size: unknown key",))
    refuse("teach", "images-teacher", "student.network.kind=unett", "--dry-run", says=("did you mean 'unet'?",))


def test_guidance_as_an_input_is_not_compiled() -> None:
    told = ["student.guidance_input=true", "objective.guidance={scale: 1.0, largest: 4.0}"]
    with pytest.raises(UsageError, match=r"train\.compile with student\.guidance_input"):
        load_config("digits-meanflow", [*told, "train.compile=true"])
    assert load_config("digits-meanflow", told).student.guidance_input
    assert load_config("digits-meanflow", ["train.compile=true"]).train.compile


def test_a_difference_of_outputs_needs_their_precision() -> None:
    """In bfloat16 it would have no digits."""
    with pytest.raises(UsageError, match=r"objective\.jvp one_sided needs train\.precision fp32"):
        load_config("digits-meanflow", ["objective.jvp=one_sided", "train.precision=bf16"])
    assert load_config("digits-meanflow", ["objective.jvp=one_sided"]).objective.jvp == "one_sided"
