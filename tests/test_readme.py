"""README: every command through its real parser, and from top to bottom all that is cheap, commands and Python, on the digits.

`test_own_kinds` has the blocks of `mine.py`.
"""

import itertools
import os
import re
import shlex
import tomllib

import numpy as np
import pytest
from helpers import README, main

from bsvae_jax.cli import options
from bsvae_jax.cli.main import COMMANDS

ROOT, TEXT = README.parent, README.read_text()
BLOCK = re.compile(r"(?:<!-- ([\w .-]+) -->\n)?```(\w*)\n(.*?)```\n", re.DOTALL)
OWN_FILE = ("mine.py", "commands of mine.py")


def commands_of(lines: str) -> list[list[str]]:
    """The words of every command of shell lines."""
    words = [shlex.split(line, comments=True) for line in lines.replace("\\\n", " ").splitlines()]
    return [
        list(command)
        for line in words
        for separator, command in itertools.groupby(line, key=lambda word: word == "&&")
        if not separator
    ]


def all_commands() -> list[list[str]]:
    """Those of the blocks, and those between backticks in the text and its tables."""
    blocks = [command for marker, language, body in BLOCK.findall(TEXT) if language == "bash" for command in commands_of(body)]
    programs = "|".join(("bsvae", "pip", "python"))
    inline = re.findall(rf"`((?:{programs}) [^`]+)`", BLOCK.sub("", TEXT))
    return blocks + [command for line in inline for command in commands_of(line.replace("\n", " "))]


def parses(arguments: list[str]) -> None:
    """Give `bsvae` these arguments."""
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stop:
            main(*arguments)
        assert stop.value.code == 0
    elif arguments[0] not in COMMANDS or len(arguments) > 1:  # else it is a name in the text
        main(*arguments)


@pytest.fixture
def parsed_only(monkeypatch):
    """Commands end when their options are read."""
    read = options.read_options

    def without_calling(*arguments, **defaults):
        read(*arguments, **defaults)
        return lambda: None

    monkeypatch.setattr(options, "read_options", without_calling)


def test_every_command_is_one(parsed_only, monkeypatch, tmp_path):
    """Options exist, extras and markers are declared, files are there. Nothing is run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    markers = [line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    own = {marker: body for marker, _, body in BLOCK.findall(TEXT) if marker}
    (tmp_path / "mine.py").write_text(own["mine.py"])
    monkeypatch.chdir(tmp_path)
    found = all_commands()
    for command in found:
        command = command[command[0] == "srun" :]
        program, arguments = command[0].removeprefix(".venv/bin/"), command[1:]
        if program == "bsvae":
            parses(arguments)
        elif program == "pip":
            assert arguments[0] == "install", command
            assert set(re.findall(r"\[(\w+)\]", arguments[-1])) <= set(extras), command
        elif program in ("python", "python3") and arguments[0] == "-m":
            assert arguments[1] in ("venv", "pytest"), command
            assert set(arguments[3:]) <= {*markers, "auto", "loadfile", "--dist", "-n"} or arguments[1] == "venv", command
        else:
            file = ROOT / (arguments[0] if program == "python" else program)
            assert file.is_file(), command
            assert program == "python" or os.access(file, os.X_OK), command
    assert len([command for command in found if command[0] == "bsvae"]) > 25


def test_the_parser_is_the_real_one(parsed_only, monkeypatch, capsys):
    """The test above could pass by reading nothing."""
    monkeypatch.chdir(ROOT)
    for wrong in (["--bta", "4"], ["--beta", "four"], ["--network", "lstm"]):
        with pytest.raises(SystemExit) as stop:
            main("train", "configs/digits.py", *wrong)
        assert stop.value.code == 2
    capsys.readouterr()


FEWEST = {
    "train": ("--epochs", "1", "--devices", "1"),
    "evaluate": ("--no-figures", "--split", "test"),
    "fit-prior": ("--kind", "gaussian"),
}


def is_cheap(command: list[str]) -> bool:
    """One run of the digits, and what opens it; no LeNet is trained. (`test_own_kinds` has a sweep of README.)"""
    if command == ["bsvae", "train", "configs/digits.py"]:
        return True
    return (
        command[0] == "bsvae" and command[1] not in ("train", "compare") and "runs/digits" in command and "lenet" not in command
    )


@pytest.mark.long
def test_from_top_to_bottom(monkeypatch, tmp_path, capsys):
    """What a reader types, in one folder and one Python session."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    session: dict = {}
    ran = []
    for marker, language, body in BLOCK.findall(TEXT):
        if language == "python" and marker not in OWN_FILE:
            exec(compile(body, str(README), "exec"), session)
        elif language == "bash" and marker not in OWN_FILE:
            for command in filter(is_cheap, commands_of(body)):
                main(*command[1:], *FEWEST.get(command[1], ()))
                ran.append(command[1])
    assert ran == ["train", "sample", "evaluate", "fit-prior", "evaluate", "export"]
    # The first block of Python: its gradient has the shapes of the weights, and moves them.
    assert [array.shape for array in session["gradient"]] == [(64, 32), (16, 64)]
    assert all(np.abs(array).max() > 0 for array in session["gradient"])
    assert session["report"]["calibrated_elbo"].unit == "nats"
    assert np.isfinite(float(session["metrics"].objective))
    assert "calibrated_elbo" in capsys.readouterr().out


def test_it_is_read_in_one_sitting():
    """Its size; and the files and pictures that it names are there."""
    assert 11_000 <= README.stat().st_size <= 13_000
    assert {path.name for path in (ROOT / "configs").iterdir()} - {"__pycache__"} <= set(re.findall(r"`(\w+\.py)`", TEXT))
    named = re.findall(r"\]\((?!http)([^)]+)\)", TEXT) + re.findall(r"(?:configs|notebooks|tests)/[\w/]+\.(?:py|ipynb)", TEXT)
    assert len(named) > 10
    assert not [name for name in named if not (ROOT / name).is_file()]
