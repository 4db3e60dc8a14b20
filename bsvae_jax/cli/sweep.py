"""`bsvae sweep`: every combination of some settings of one experiment."""

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Fixed, Suppress, arg

from bsvae_jax.cli.experiment import (
    BETA_SCHEDULE,
    DECODER_VARIANCE,
    PRIOR,
    ConfigFile,
    DataAndNetwork,
    Fields,
    keep_compiled_programs,
    read_config,
)
from bsvae_jax.cli.options import Merged
from bsvae_jax.cli.report import print_report
from bsvae_jax.config import Config
from bsvae_jax.errors import DivergenceError
from bsvae_jax.objective.gaussian import Shared
from bsvae_jax.sweeps.grid import Sweep, choose_priors, choose_schedules, choose_variances, load_sweep

EXECUTION = Literal["loop", "scan", "vmap"]

_Fixed = Suppress[Fixed[Any]]
_CONFIG = Config()


@dataclass(frozen=True)
class _Base(Config):
    """A config without options for what a sweep has lists for."""

    beta: _Fixed = _CONFIG.beta
    decoder_variance: _Fixed = _CONFIG.decoder_variance
    prior: _Fixed = _CONFIG.prior
    beta_schedule: _Fixed = _CONFIG.beta_schedule


@dataclass(frozen=True)
class _Lists:
    """The grid: a member for every combination of the values of these lists."""

    beta: tuple[float, ...]
    """Weights of the rate; given here, they are those of all decoder variances."""
    learning_rate: tuple[float, ...]
    """Peak learning rates; the config's own if not given."""
    seeds: int
    """Number of seeds, counted up from --seed."""
    decoder_variance: tuple[DECODER_VARIANCE, ...] | None = None
    """Kinds of decoder variance; those of the config file if not given."""
    constant: Annotated[tuple[float, ...] | None, arg(name="decoder-variance.variance")] = None
    """Variances of the constant kind, a member for each."""
    optimal: Annotated[tuple[Shared, ...] | None, arg(name="decoder-variance.over")] = None
    """What shares one optimal variance, a member for each."""
    prior: tuple[PRIOR, ...] | None = None
    """Kinds of prior; those of the config file if not given."""
    components: Annotated[tuple[int, ...] | None, arg(name="prior.components")] = None
    """Numbers of components of the mixture kind, a member for each."""
    pseudo_inputs: Annotated[tuple[int, ...] | None, arg(name="prior.pseudo-inputs")] = None
    """Numbers of pseudo-inputs of the vamp kind, a member for each."""
    beta_schedule: tuple[BETA_SCHEDULE, ...] | None = None
    """Kinds of schedule of beta; those of the config file if not given."""
    target_rates: Annotated[tuple[float, ...] | None, arg(name="beta-schedule.nats")] = None
    """Rates of the target_rate kind, nats, a member for each in place of one for each beta."""

    def grid(self, config: Config, file_grid: Sweep) -> Sweep:
        """The sweep of these lists; what they leave open is that of the config file."""
        variances = choose_variances(config, file_grid.decoder_variance, self.decoder_variance, self.constant, self.optimal)
        priors = choose_priors(config, file_grid.prior, self.prior, self.components, self.pseudo_inputs)
        schedules = choose_schedules(config, file_grid.beta_schedule, self.beta_schedule, self.target_rates)
        own_beta = tuple((variance, betas) for variance, betas in file_grid.own_beta if variance in variances)
        if self.beta is not file_grid.beta:  # given on the command line
            own_beta = ()
        return Sweep(self.beta, variances, self.seeds, self.learning_rate, priors, own_beta, schedules)


def sweep(
    config_file: ConfigFile,
    config: Annotated[_Base, *Fields],
    lists: Merged[_Lists],
    kinds: Merged[DataAndNetwork],
    file_grid: _Fixed,
    workdir: Path | None = None,
    execution: EXECUTION | None = None,
    members_at_once: int | None = None,
    start_from: Path | None = None,
) -> None:
    """Train every combination of the lists and write the report; run it again to continue, with longer lists or more --epochs.

    Members that differ only in beta, seed, learning rate, a constant variance or a target rate are trained as one compiled
    program. Each ends as a run of its own in WORKDIR/members, just as bsvae train leaves it.

    Example: bsvae sweep configs/digits.py --beta 0.1 1 10 --decoder-variance optimal constant --seeds 3
    Example: bsvae sweep configs/digits.py --beta-schedule target_rate --beta-schedule.nats 5 10 20

    Args:
      config_file: A Python file with get_config(), and get_sweep() if it has a grid of its own.
      config: The base of all members.
      lists: The grid.
      kinds: Kinds in place of those of the config file.
      file_grid: The grid of the config file.
      workdir: Folder of this sweep; runs/NAME-OF-CONFIG-sweep if not given.
      execution: How members share a program: one after the other in separate calls, one after the other in one call, or side
        by side; what was measured to be fastest if not given.
      members_at_once: Members in one program; as many as fit into memory if not given.
      start_from: Folder of a run with whose weights all members begin, as for bsvae train.
    """
    from bsvae_jax.sweeps.execution import choose_execution
    from bsvae_jax.sweeps.fit_sweep import fit_sweep

    base = Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)})
    grid = lists.grid(base, file_grid)
    if (execution or choose_execution(base, "cpu")) != "loop":
        _make_a_device_of_each_core()
    keep_compiled_programs()
    folder = Path("runs") / f"{config_file.stem}-sweep" if workdir is None else workdir
    result = fit_sweep(base, grid, folder, execution, members_at_once, start_from=start_from)
    print_report(folder)
    if result.failed:
        raise DivergenceError(f"{len(result.failed)} diverged: {', '.join(result.failed)}. The report has the rest.")


def _make_a_device_of_each_core() -> None:
    """Let JAX have a CPU device for each core, unless the user has said how many.

    One device has all cores as well, but a step of a small dense network leaves the second idle: a member on each of two
    devices takes two thirds of the time. Each member's numbers are the same to the bit.
    """
    import jax

    count = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if count == -1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with contextlib.suppress(RuntimeError):  # JAX has its devices already, where a program calls the command
            jax.config.update("jax_num_cpu_devices", cores)


def defaults(arguments: list[str]) -> dict[str, Any]:
    """What the options are without being given: the config and the grid of the config file."""
    config = read_config("sweep", arguments, kinds=DataAndNetwork)
    file_grid = Sweep() if arguments[0] in ("-h", "--help") else load_sweep(arguments[0])
    base = _Base(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Config)})
    lists = _Lists(file_grid.beta, file_grid.learning_rate, file_grid.seeds)
    return {"config": base, "lists": lists, "file_grid": file_grid}
