"""The recipes that ship: listed, documented, and consistent with each other."""

import json

import pytest
import yaml
from conftest import succeed

from fewstep.comparison.config import load_comparison
from fewstep.config import comparison_names, load_config, recipe_names, recipe_text

EVERY = sorted([*recipe_names(), *comparison_names()])


def test_comparisons_ship_beside_the_recipes_of_their_runs() -> None:
    assert {"demo", "digits-all"} <= set(comparison_names())
    assert not set(comparison_names()) & set(recipe_names())
    for name in comparison_names():
        comparison = load_comparison(name)
        assert {comparison.teacher, *comparison.students} <= set(recipe_names())


@pytest.mark.parametrize("name", EVERY)
def test_a_recipe_opens_with_its_purpose_and_carries_its_name(name: str) -> None:
    lines = recipe_text(name).splitlines()
    assert lines[0].startswith("# ")
    assert len(lines[0].split()) > 3, "the first line says what the recipe is for"
    loaded = load_comparison(name) if name in comparison_names() else load_config(name)
    assert loaded.name == name


@pytest.mark.parametrize("name", EVERY)
def test_show_prints_the_file(name: str) -> None:
    printed = succeed("recipes", "show", name).stdout
    assert printed == recipe_text(name)
    assert yaml.safe_load(printed)["name"] == name


def test_list_shows_each_with_its_command_and_its_purpose() -> None:
    lines = [line.split(maxsplit=2) for line in succeed("recipes", "list").stdout.splitlines()]
    purposes = {name: recipe_text(name).splitlines()[0][2:] for name in EVERY}
    assert {name: purpose for name, _, purpose in lines} == purposes
    assert [name for name, _, _ in lines] == EVERY
    commands = {name: command for name, command, _ in lines}
    assert (commands["digits-teacher"], commands["digits-meanflow"]) == ("teach", "distill")
    assert {name for name, command in commands.items() if command == "compare"} == set(comparison_names())
    document = json.loads(succeed("recipes", "list", "--json").stdout)
    assert document == {"recipes": purposes, "commands": commands}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_s_teacher_is_another_recipe_on_the_same_data(name: str) -> None:
    config = load_config(name)
    if config.teacher is None or config.teacher.kind != "run":
        return
    teacher = load_config(config.teacher.path.removeprefix("runs/"))
    assert teacher.objective.kind == "flow_matching"
    assert teacher.data == config.data
