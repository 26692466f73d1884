"""One stem per method everywhere: each method of the registry has all its chapters under one name."""

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

from lightning_compress.methods import METHODS

CHAPTERS = (
    "docs/methods/{stem}.md",
    "lightning_compress/methods/{stem}.py",
    "lightning_compress/nn/{stem}.py",
    "lightning_compress/losses/{stem}.py",
    "lightning_compress/callbacks/{stem}.py",
    "configs/{stem}.yaml",
    "examples/{stem}.py",
    "tests/methods/test_{stem}.py",
    "tests/nn/test_{stem}.py",
    "tests/losses/test_{stem}.py",
    "tests/callbacks/test_{stem}.py",
)


def camel_case(stem: str) -> str:
    return "".join(word.capitalize() for word in stem.split("_"))


def test_the_registry_is_not_empty():
    assert METHODS


@pytest.mark.parametrize("stem", METHODS)
def test_every_chapter_of_a_method_is_there(stem: str, pytestconfig: pytest.Config):
    root = Path(pytestconfig.rootpath)
    missing = [
        chapter for chapter in (c.format(stem=stem) for c in CHAPTERS) if not (root / chapter).is_file()
    ]
    assert missing == []


@pytest.mark.parametrize("stem", METHODS)
def test_a_method_has_the_four_verbs(stem: str):
    assert METHODS[stem].__name__ == f"lightning_compress.methods.{stem}"
    assert [
        verb
        for verb in ("prepare", "update", "convert", "restore")
        if not callable(getattr(METHODS[stem], verb, None))
    ] == []


@pytest.mark.parametrize(
    ("package", "suffix"), [("callbacks", ""), ("methods", "Config"), ("losses", "LossMixin")]
)
@pytest.mark.parametrize("stem", METHODS)
def test_names_follow_from_the_stem(stem: str, package: str, suffix: str):
    module = importlib.import_module(f"lightning_compress.{package}.{stem}")
    assert camel_case(stem) + suffix in module.__all__


@pytest.mark.parametrize("stem", METHODS)
def test_a_callback_takes_the_fields_of_its_config_with_the_same_defaults(stem: str):
    name = camel_case(stem)
    callback = getattr(importlib.import_module(f"lightning_compress.callbacks.{stem}"), name)
    config = getattr(METHODS[stem], f"{name}Config")
    arguments = {p.name: p.default for p in inspect.signature(callback).parameters.values()}
    assert {field.name: arguments.get(field.name, "absent") for field in dataclasses.fields(config)} == {
        field.name: field.default for field in dataclasses.fields(config)
    }


@pytest.mark.parametrize("stem", METHODS)
def test_the_card_maps_equations_to_functions_that_exist(stem: str, pytestconfig: pytest.Config):
    card = (Path(pytestconfig.rootpath) / f"docs/methods/{stem}.md").read_text(encoding="utf-8")
    modules = [importlib.import_module(f"lightning_compress.{p}.{stem}") for p in ("methods", "nn", "losses")]
    named = [name for module in modules for name in module.__all__ if f"`{name}`" in card]
    assert len(named) >= 3, "the card's table must name the functions in which each equation is found"
