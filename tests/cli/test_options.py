"""The options of commands: switches, kinds by name, kinds of a user's own, and a command that does not exist."""

import abc
import dataclasses
import functools
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from helpers import main, refused

import bsvae_jax as bv
from bsvae_jax.cli import main as cli
from bsvae_jax.cli.experiment import Experiment, Fields, Kinds, read_config, read_experiment
from bsvae_jax.cli.options import Merged, Run, parse
from bsvae_jax.config import CHOICES
from bsvae_jax.sweeps.grid import choose_schedules


@dataclass(frozen=True)
class Part(abc.ABC):
    @abc.abstractmethod
    def build(self): ...


@dataclass(frozen=True)
class Mine(Part):
    heads: int = 3
    """Number of heads."""
    attention: bool = True
    """Whether there is attention."""
    flip: bool = False
    """Whether it is turned."""

    def build(self):
        return self.heads


@dataclass(frozen=True)
class Whole:
    part: Part
    beta: float = 1.0


def parsed(command, *arguments, **defaults):
    """What `command` is called with."""

    def wrapped(value):
        return value

    wrapped.__annotations__["value"] = command
    return parse(functools.partial(wrapped, **defaults), args=list(arguments))


def test_the_class_of_the_default_decides_which_options_there_are():
    given = parsed(Annotated[Whole, *Fields], "--part.heads", "7", "--beta", "2", value=Whole(Mine()))
    assert given == Whole(Mine(heads=7), beta=2.0)


def test_switches_are_switches(capsys):
    given = parsed(Annotated[Whole, *Fields], "--part.no-attention", "--part.flip", value=Whole(Mine()))
    assert given == Whole(Mine(attention=False, flip=True))
    with pytest.raises(SystemExit):
        parsed(Annotated[Whole, *Fields], "--part.flip", "True", value=Whole(Mine()))
    assert "Unrecognized options: True" in capsys.readouterr().err


def test_switches_of_a_config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text("import bsvae_jax as bv\ndef get_config():\n    return bv.Config(network=bv.config.Spatial())\n")
    base = read_config("train", [str(path)])
    arguments = ["--rematerialize", "--augmentation.flip", "--network.no-attention"]
    changed = parsed(Annotated[bv.Config, *Fields], *arguments, value=base)
    assert (changed.rematerialize, changed.augmentation.flip, changed.network.attention) == (True, True, False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--network.hiden", "3"], "--network.hiden is not an option of --network mlp; did you mean --network.hidden?"),
        (["--network.widht=3"], "--network.widht is not an option of --network mlp; did you mean --network.widths, which "),
        (["--network.widths", "3"], "did you mean --network.widths, which --network residual has?"),
        (["--network.no-attention"], "did you mean --network.attention, which --network spatial has?"),
        (
            ["--network", "residual", "--network.widht", "3"],
            "is not an option of --network residual; did you mean --network.widths?",
        ),
        (
            ["--decoder-variance.variance", "1"],
            "did you mean --decoder-variance.variance, which --decoder-variance constant has?",
        ),
        (["--prior.pseudo_input", "1"], "did you mean --prior.pseudo-inputs, which --prior vamp has?"),
        (["--prior.xyz", "1"], "--prior.xyz is not an option of --prior standard_normal."),
    ],
)
def test_an_option_that_the_kind_of_a_part_does_not_have(options, sentence, tmp_path):
    path = tmp_path / "small.py"
    path.write_text("import bsvae_jax as bv\ndef get_config():\n    return bv.Config(network=bv.config.MLP())\n")
    with pytest.raises(bv.UserError, match=re.escape(sentence)):
        read_config("train", [str(path), *options])


def test_a_run_and_the_file_of_its_own_classes():
    given = parsed(Merged[Run], "runs/mine", "--config", "mine.py", "--checkpoint", "best")
    assert given == Run(Path("runs/mine"), Path("mine.py"), "best")


def test_the_names_of_kinds_are_those_of_the_config():
    for field in dataclasses.fields(Kinds):
        literal, _ = typing.get_args(typing.get_type_hints(Kinds)[field.name])
        # Flow matching is no prior to train with; `bsvae fit-prior` has it.
        assert set(typing.get_args(literal)) == set(CHOICES[field.name]) - {"flow_matching"}


def test_a_kind_by_name_keeps_what_the_config_says_of_it():
    config = bv.Config(network=bv.config.MLP((8,)))
    assert Kinds(network="mlp").applied_to(config) == config
    assert Kinds(network="linear", prior="vamp").applied_to(config).network == bv.config.Linear()


def test_a_schedule_of_beta_by_name_with_its_numbers(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("import bsvae_jax as bv\ndef get_config():\n    return bv.Config()\n")
    arguments = [
        "--beta-schedule",
        "target_rate",
        "--beta-schedule.nats",
        "20",
        "--free-bits.nats",
        "0.5",
        "--free-bits.group",
        "4",
    ]
    base = read_experiment("train", [str(path), *arguments])
    given = parsed(Merged[Experiment], *arguments, value=base).config
    assert given == bv.Config(beta_schedule=bv.TargetRate(20.0), free_bits=bv.FreeBits(0.5, 4))
    wanted = bv.ConstantBeta(), bv.TargetRate(5.0), bv.TargetRate(9.0)
    assert choose_schedules(bv.Config(), (), ["constant_beta", "target_rate"], [5.0, 9.0]) == wanted
    names = [member.name for member in bv.Sweep((1.0, 2.0), (bv.Optimal(),), 1, beta_schedule=wanted).members(bv.Config())]
    assert names == [
        "optimal_beta1_seed0",
        "optimal_beta2_seed0",
        "optimal_target_rate-5_beta1_seed0",
        "optimal_target_rate-9_beta1_seed0",
    ]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"bsvae {bv.__version__}\n"


def test_a_command_that_does_not_exist(capsys):
    assert "invalid choice: 'tarin'" in refused(capsys, "tarin")
    assert "required: COMMAND" in refused(capsys)


def test_every_command_has_a_line_in_the_help_and_a_file(capsys):
    with pytest.raises(SystemExit):
        main("--help")
    printed = capsys.readouterr().out
    folder = Path(cli.__file__).parent
    for name in cli.COMMANDS:
        assert f"    {name}" in printed
        assert (folder / f"{name.replace('-', '_')}.py").is_file()
