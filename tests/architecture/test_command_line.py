"""The options of the command line are public API: none comes, goes or is renamed unnoticed."""

import re
import tomllib
from pathlib import Path

import pytest

from lightning_compress import cli

OPTIONS = {
    "bench": "--against --backend --batch-sizes --dtypes --json --lengths --rounds --threads MODEL_DIR",
    "demo": "--output --seed --steps --target-params",
    "export": "--counts --exit --format --int8 --length --output --quantile --runtime --texts MODEL_DIR",
    "report": "RUN_DIR",
}
COMMANDS = {"fit", "validate", "test", "predict", *OPTIONS}


@pytest.mark.parametrize("command", OPTIONS)
def test_the_options_of_our_commands_are_these(command: str):
    parser = getattr(cli, f"{command}_parser")()
    names = {name for action in parser._actions for name in action.option_strings or [action.dest.upper()]}
    assert sorted(names - {"-h", "--help"}) == OPTIONS[command].split()


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]):
    cli.main(["--help"])
    assert set(re.findall(r"^  ([a-z]+)  ", capsys.readouterr().out, flags=re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_says_what_it_does(command: str):
    actions = getattr(cli, f"{command}_parser")()._actions
    assert [action.dest for action in actions if not action.help] == []


def test_the_console_script_is_this_command_line(pytestconfig: pytest.Config):
    project = tomllib.loads((Path(pytestconfig.rootpath) / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    assert project["scripts"] == {"lightning-compress": f"{cli.main.__module__}:{cli.main.__name__}"}
