"""Options that several commands share, and how the options of a command are read."""

import contextlib
import functools
import importlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from bsvae_jax.errors import UserError

if TYPE_CHECKING:
    from bsvae_jax.evaluation.trained import Restored

Part = TypeVar("Part")
Merged = Annotated[Part, tyro.conf.arg(name="")]
"""Options of a dataclass among those of the command itself: `--beta`, not `--experiment.beta`."""
Checkpoint = Literal["latest", "best"]
Prior = Literal["model", "fitted"]


def command_of(name: str, arguments: list[str]) -> Callable[..., Callable[[], None]]:
    """The command of that name as a function of its options, for `parse`; it returns the call that they amount to.

    It is the function of the same name in the file of the same name. Where that file has a function `defaults`, it says which
    defaults are known only now, of the config file among the `arguments`.
    """
    module = importlib.import_module(f"bsvae_jax.cli.{name.replace('-', '_')}")
    command = getattr(module, name.replace("-", "_"))

    @functools.wraps(command)
    def parsed(*values: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *values, **options)

    return functools.partial(parsed, **(module.defaults(arguments) if hasattr(module, "defaults") else {}))


def read_options(name: str, arguments: list[str]) -> Callable[[], None]:
    """The call of a command that its arguments amount to, which is still to be made."""
    # A config file may print while it is run, and with --json standard output is for the document.
    said = contextlib.redirect_stdout(sys.stderr) if "--json" in arguments else contextlib.nullcontext()
    with said:
        command = command_of(name, arguments)
    return parse(command, prog=f"bsvae {name}", args=arguments)


def parse(target: Any, **options: Any) -> Any:
    """`tyro.cli`, but for a UserError of a field, which is raised as it is: tyro takes every ValueError for one of its own."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(target, **options)
    except SystemExit as stop:
        error: BaseException | None = stop
        while error is not None and not isinstance(error, UserError):
            error = error.__cause__ or error.__context__
        if error is not None:
            raise error from None
        sys.stderr.write(said.getvalue())
        raise


@dataclass(frozen=True)
class Workdir:
    """The folder of a run or of a sweep."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Folder that bsvae train or bsvae sweep wrote."""
    config: Path | None = None
    """Python file with the run's own classes, where its network, prior, variance or data set are not of this package."""

    def load_classes(self) -> None:
        """Run that file, which a run folder never does by itself; whatever reads the folder afterwards finds the classes."""
        if self.config is not None:
            from bsvae_jax.config import load_module

            load_module(self.config)


@dataclass(frozen=True)
class Run(Workdir):
    """A trained run."""

    checkpoint: Checkpoint = "latest"
    """The end of training, or the least held-out objective."""

    def restore(self, prior: Prior = "model", workdir: Path | None = None) -> "Restored":
        """The model; of another `workdir`, a member of a sweep."""
        from bsvae_jax.training.restore import restore

        return restore(workdir or self.workdir, self.checkpoint, prior)


@dataclass(frozen=True)
class Data:
    """The data of a trained run."""

    path: Path | None = None
    """Where they lie now, if not where they were when the run began."""


@dataclass(frozen=True)
class Processes:
    """Several processes, one a machine, that train one model."""

    distributed: bool = False
    """This is one of several processes, of which SLURM, Open MPI, a Cloud TPU pod or GKE tells each its place."""
    coordinator: str | None = None
    """Where nothing tells: HOST:PORT of process 0, the same for all of them."""
    processes: int | None = None
    """With a coordinator, the number of processes."""
    process: int | None = None
    """With a coordinator, which of them this one is, from 0."""
    connect_timeout: int = 60
    """Seconds to wait for the other processes."""

    def join(self) -> None:
        """Wait for the others, where there are any; before anything touches a device."""
        from bsvae_jax.distributed import multihost
        from bsvae_jax.errors import check_count

        check_count("--connect-timeout", self.connect_timeout)
        place = (self.coordinator, self.processes, self.process)
        if self.distributed or place != (None, None, None):
            multihost.join(*place, timeout=self.connect_timeout)
