"""The options of commands that take a config file: every field of its config, and the kinds of its parts by name."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from bsvae_jax import config as configs
from bsvae_jax.cli.options import Merged, parse
from bsvae_jax.config import Config
from bsvae_jax.errors import UserError, closest

DATA = Literal["digits", "mnist", "arrays", "folder", "tfds"]
NETWORK = Literal["linear", "mlp", "residual", "spatial"]
DECODER_VARIANCE = Literal["constant", "optimal", "learned", "predicted"]
BETA_SCHEDULE = Literal["constant_beta", "linear_warmup", "cyclical", "capacity", "target_rate"]
PRIOR = Literal["standard_normal", "mixture", "vamp", "flow"]

ConfigFile = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
Fields = (tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands)
"""Annotations of a config whose fields are options; the kinds of its parts, own ones too, decide which there are."""


@dataclass(frozen=True)
class DataAndNetwork:
    """Kinds in place of those of the config file."""

    data: DATA | None = None
    """Kind of data source to use instead of the config's."""
    network: NETWORK | None = None
    """Kind of network to use instead of the config's."""

    def applied_to(self, config: Config) -> Config:
        """The config with the kinds named here in place of its own."""
        for field, name in vars(self).items():
            if name is not None:
                kind = configs.CHOICES[field][name]
                if not isinstance(getattr(config, field), kind):
                    config = dataclasses.replace(config, **{field: kind()})
        return config


@dataclass(frozen=True)
class Kinds(DataAndNetwork):
    """Kinds in place of those of the config file."""

    decoder_variance: DECODER_VARIANCE | None = None
    """Kind of decoder variance to use instead of the config's."""
    prior: PRIOR | None = None
    """Kind of prior to use instead of the config's."""
    beta_schedule: BETA_SCHEDULE | None = None
    """How beta changes during training, instead of as the config says."""


@dataclass(frozen=True)
class Experiment:
    """The experiment of a config file, changed by options."""

    config: Annotated[Config, *Fields]
    """The experiment."""
    kinds: Merged[Kinds] = Kinds()


def read_config(command: str, arguments: list[str], files: tuple[str, ...] = ("CONFIG",), kinds: Any = Kinds) -> Config:
    """The config whose fields are the options of a command: its file and the kinds beside it are read before all others.

    Args:
      command: its name, for messages.
      arguments: of the command line, behind the command.
      files: what the first arguments are; the config is the last of them.
      kinds: dataclass of the options that name kinds.

    Raises:
      UserError: the files do not come first; or as `load_config`.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        return Config()
    if len(arguments) < len(files) or any(argument.startswith("-") for argument in arguments[: len(files)]):
        what = "The config file comes" if len(files) == 1 else "The files come"
        raise UserError(f"{what} first: bsvae {command} {' '.join(files)} [options].")
    config = configs.load_config(arguments[len(files) - 1])
    prog = f"bsvae {command}"
    chosen, others = parse(kinds, prog=prog, args=arguments[len(files) :], return_unknown_args=True, add_help=False)
    config = chosen.applied_to(config)
    for option in others:
        _check_option(option, config, kinds)
    return config


def _check_option(argument: str, config: Config, kinds: Any) -> None:
    """Raise a UserError for an option of a part, as `--network.widths`, that the kind of this part does not have.

    Its own option of the nearest name is offered, or the kind that has such a one, which the parser cannot know.
    """
    part, _, rest = argument.partition("=")[0].removeprefix("--").partition(".")
    field, name = part.replace("-", "_"), rest.partition(".")[0].removeprefix("no-").replace("-", "_")
    hints = get_type_hints(kinds)
    if not (argument.startswith("--") and name and field in hints):
        return
    kind = type(getattr(config, field))
    own = [of.name for of in dataclasses.fields(kind)]
    if name in own:
        return
    names = get_args(get_args(hints[field])[0])
    owners = {of.name: other for other in reversed(names) for of in dataclasses.fields(configs.CHOICES[field][other])}
    match = name if name in owners else closest(name, own) or closest(name, owners)
    hint = "" if match is None else f"; did you mean --{part}.{match.replace('_', '-')}"
    hint += "" if match is None else "?" if match in own else f", which --{part} {owners[match]} has?"
    raise UserError(f"--{part}.{rest} is not an option of --{part} {configs.kind_name(kind)}{hint or '.'}")


def read_experiment(command: str, arguments: list[str], files: tuple[str, ...] = ("CONFIG",)) -> Experiment:
    """The config of `read_config` as the default value of a command's experiment."""
    return Experiment(read_config(command, arguments, files))


def keep_compiled_programs() -> None:
    """Find programs again that were compiled by earlier commands."""
    from bsvae_jax._io.files import cache_folder
    from bsvae_jax.distributed.mesh import keep_compiled_programs as keep

    keep(cache_folder() / "compiled")
