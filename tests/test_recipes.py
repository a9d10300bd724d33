"""The recipes that ship: listed, documented, and consistent with each other."""

import json

import pytest
import yaml
from conftest import succeed

from fewstep.config import load_config, recipe_names, recipe_text


def test_the_demo_s_recipes_ship() -> None:
    from fewstep.workflows import DEMO_STUDENTS, DEMO_TEACHER

    assert {DEMO_TEACHER, *DEMO_STUDENTS} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_opens_with_its_purpose_and_carries_its_name(name: str) -> None:
    lines = recipe_text(name).splitlines()
    assert lines[0].startswith("# ")
    assert len(lines[0].split()) > 3, "the first line says what the recipe is for"
    assert load_config(name).name == name


@pytest.mark.parametrize("name", recipe_names())
def test_show_prints_the_file(name: str) -> None:
    printed = succeed("recipes", "show", name).stdout
    assert printed == recipe_text(name)
    assert yaml.safe_load(printed)["name"] == name


def test_list_shows_each_with_its_purpose() -> None:
    lines = succeed("recipes", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    document = json.loads(succeed("recipes", "list", "--json").stdout)
    assert document == {"recipes": {name: recipe_text(name).splitlines()[0][2:] for name in recipe_names()}}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_s_teacher_is_another_recipe_on_the_same_data(name: str) -> None:
    config = load_config(name)
    if config.teacher is None or config.teacher.kind != "run":
        return
    teacher = load_config(config.teacher.path.removeprefix("runs/"))
    assert teacher.objective.kind == "flow_matching"
    assert teacher.data == config.data
