"""A run that goes on under a changed config: what may change, and what is said and kept of it."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bsvae_jax import config as configs
from bsvae_jax.config import Config
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.errors import UserError
from bsvae_jax.training.state import learning_rate_schedule

MAY_CHANGE = (
    "epochs",
    *("optimizer.learning_rate", "optimizer.schedule", "optimizer.cycles", "optimizer.warmup_steps"),
    *("optimizer.weight_decay", "optimizer.skip_nonfinite"),
)
"""Fields of a config that decide how long and how fast it is trained: not what is minimized, nor what a checkpoint holds."""

AGAIN = ("the steps that followed taken again, from an earlier checkpoint",)
"""What changed where a later checkpoint did not load."""


class Change(NamedTuple):
    """An entry of `changes` in `config.json`."""

    step: int
    """After which it holds."""
    changed: tuple[str, ...]
    """`"epochs: 50 -> 100"`, for people to read."""
    run: str
    """Identity of the run before; its older files carry it."""


def read_changes(values: Mapping[str, Any]) -> tuple[Change, ...]:
    """Those of `config.json`, oldest first."""
    found = values.get("changes", ())
    return tuple(Change(int(one["step"]), tuple(map(str, one["changed"])), str(one["run"])) for one in found)


def check_change(
    folder: Path, saved: Config, wanted: Config, step: int, images: int, may_change: Collection[str] = MAY_CHANGE
) -> None:
    """Raise a UserError if the run in `folder` cannot go on as `wanted`.

    Args:
      folder: of the run.
      saved: its config.
      wanted: the config it is to have.
      step: that it has come to.
      images: trained on.
      may_change: fields, by dotted name.
    """
    changed = configs.changes(saved, wanted)
    names = {change.partition(":")[0] for change in changed}
    said = "; ".join(changed)
    if not names <= set(may_change):
        raise UserError(
            f"{folder} holds a run of another config ({said}). Choose that config, or another --workdir, with --start-from "
            f"{folder} to begin with its weights; a run that goes on may change {', '.join(may_change)}."
        )
    total = steps_through(wanted.epochs, images, wanted.batch_size)
    if total < step:
        least = next(epochs for epochs in range(1, saved.epochs + 1) if steps_through(epochs, images, saved.batch_size) >= step)
        raise UserError(
            f"{folder} has trained for {step} steps, so that it cannot end with epoch {wanted.epochs} ({said}). Give --epochs "
            f"{least} or more, or another --workdir."
        )
    if total == step and names - {"epochs"}:
        raise UserError(
            f"{folder} has taken its last step, {step}, so that this would change nothing: {said}. Give more --epochs as well, "
            f"or another --workdir with --start-from {folder}."
        )


def describe_change(folder: Path, saved: Config, wanted: Config, step: int, images: int) -> str:
    """A sentence on the run that goes on as `wanted` after `step`, and what its learning rate does."""
    total = steps_through(wanted.epochs, images, wanted.batch_size)
    sentence = f"{folder} goes on after step {step} with {'; '.join(configs.changes(saved, wanted))}."
    if step == total:
        return sentence
    before = learning_rate_schedule(saved.optimizer, steps_through(saved.epochs, images, saved.batch_size))
    now = learning_rate_schedule(wanted.optimizer, total)
    was = f", after {float(before(step - 1)):.3g} at the last" if step else ""
    return (
        f"{sentence} Its learning rate is that of a {wanted.optimizer.schedule} schedule over all {total} steps, as if that "
        f"had been given from the beginning: {float(now(step)):.3g} at the next step{was}."
    )


def with_change(values: Mapping[str, Any], config: Any, change: Change) -> dict[str, Any]:
    """What `config.json` holds after a change, from what it held before and the new config as JSON.

    Where later checkpoints did not load, steps are taken again: what was to hold after them holds after this one.
    """
    before = [one | {"step": min(one["step"], change.step)} for one in values.get("changes", ())]
    return {**values, "config": config, "changes": [*before, change._asdict()]}
