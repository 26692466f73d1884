"""The tour names what is in the code."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

TOUR = Path(__file__).parents[2] / "docs" / "tour.md"
NAMES = re.findall(r"`([\w/]+)\.py:([\w.]+)`", TOUR.read_text(encoding="utf-8"))


def test_the_tour_names_functions():
    assert len(NAMES) > 30


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_a_name_in_the_tour_exists(file: str, name: str):
    module = importlib.import_module(f"lightning_compress.{file.removesuffix('/__init__').replace('/', '.')}")
    assert reduce(getattr, name.split("."), module) is not None
