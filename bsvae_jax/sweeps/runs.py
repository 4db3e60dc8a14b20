"""The runs and sweeps below a folder and how far each has come, by their files alone: no device, no class of a user's."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bsvae_jax import config as configs
from bsvae_jax._io.files import as_path, is_taken, read_json, read_metrics
from bsvae_jax._io.terminal import aligned
from bsvae_jax.config import DecoderVariance
from bsvae_jax.data.shuffle import steps_through
from bsvae_jax.errors import UserError
from bsvae_jax.objective import Kind
from bsvae_jax.training.evaluated import read_evaluation
from bsvae_jax.training.identity import EDITED
from bsvae_jax.training.stopped import final_step, read_failure

State = Literal["finished", "running", "interrupted", "diverged", "begun", "imported", "exported", "damaged"]

NUMBERS = {
    "objective": "objective",
    "rate": "rate",
    "distortion": "distortion",
    "calibrated_elbo": "calibrated ELBO",
    "fid": "FID",
}
"""Of the test set; for a run that is not evaluated yet those of its last epoch, of the images for validation where there are
such."""


class RunSummary(NamedTuple):
    """What is known of a run or of a sweep without opening its model.

    >>> RunSummary(Path("runs/digits"), "run", "interrupted", 40, 750).progress()
    '40 of 750'
    """

    folder: Path
    kind: Literal["run", "sweep"]
    state: State
    """finished; running: a process has the folder; interrupted: the same command continues; diverged; begun: no step is logged
    yet; imported: weights of another program before their first step; exported: weights without a training; damaged."""
    step: int | None = None
    """Last step logged; of a sweep, its members that have finished."""
    total: int | None = None
    """Steps of the whole run; of a sweep, its members."""
    settings: dict[str, Any] = {}
    """data, network, decoder_variance, beta and seed; of a sweep, the first two."""
    numbers: dict[str, float] = {}
    """Those of `NUMBERS` that are known."""
    note: str = ""
    """Why it stopped, or what is damaged."""

    def progress(self) -> str:
        """`40 of 750`, or `3 of 8 members`."""
        if self.step is None:
            return ""
        return f"{self.step:,} of {self.total:,}" + (" members" if self.kind == "sweep" else "")


def list_runs(folder: str | Path, members: bool = False) -> list[RunSummary]:
    """The runs and sweeps in a folder and in the folders below it, by name.

    Args:
      folder: where to look; it may be a run or a sweep itself.
      members: list the members of each sweep after it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     list_runs(folder)
    []

    Raises:
      UserError: there is no such folder. A run whose files are damaged is listed, and its `note` says what is wrong.
    """
    folder = as_path(folder, "folder")
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give one that holds runs, runs/ for one.")
    return list(_below(folder, members))


def _below(folder: Path, members: bool) -> Iterator[RunSummary]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        path = Path(place)
        if "sweep.json" in files:
            yield from _sweep(path, members)
            folders.clear()
        elif "config.json" in files and (summary := _run(path)) is not None:
            yield summary
            folders.clear()


def _run(folder: Path) -> RunSummary | None:
    """A run; None where the `config.json` is of something else."""
    try:
        with read_json(folder / "config.json", EDITED) as values:
            if not isinstance(values, dict) or not {"config", "data"} <= set(values):
                return None
            config, data = values["config"], values["data"]
            settings = {"data": str(data["name"]), "network": _label(config["network"], Kind)}
            settings["decoder_variance"] = _label(config["decoder_variance"], DecoderVariance)
            settings |= {"beta": config["beta"], "seed": config["seed"]}
            total = steps_through(config["epochs"], data["train"], config["batch_size"])
        rows, evaluation, failure = read_metrics(folder), read_evaluation(folder), read_failure(folder)
        final = final_step(folder, total)
    except UserError as error:
        return RunSummary(folder, "run", "damaged", note=str(error))
    step = max((row["step"] for row in rows), default=0)
    numbers: Mapping[str, float | None] = next((row for row in reversed(rows) if row["split"] != "train"), {})
    if evaluation is not None and "test" in evaluation.report and (evaluation.step >= step or step >= final):
        numbers = {name: quantity.value for name, quantity in evaluation.report["test"].items()}
    known = {name: float(value) for name in NUMBERS if (value := numbers.get(name)) is not None}
    state: State = "interrupted"
    note = failure or ""
    if is_taken(folder):
        state = "running"
    elif failure is not None:
        state = "diverged"
    elif not rows:
        state = "imported" if "imported" in values else "begun"
        if (folder / "model.safetensors").is_file():
            state, step = "exported", step if evaluation is None else evaluation.step
    elif step >= final and evaluation is not None:
        state = "finished"
        note = "" if final == total else "stopped early"
    return RunSummary(folder, "run", state, step, total, settings, known, note)


def _sweep(folder: Path, members: bool) -> Iterator[RunSummary]:
    try:
        with read_json(folder / "sweep.json", EDITED) as values:
            names = [str(name) for name in values["members"]]
            settings = {"data": str(values["data"]["name"]), "network": _label(values["config"]["network"], Kind)}
    except UserError as error:
        yield RunSummary(folder, "sweep", "damaged", note=str(error))
        return
    own = [_run(folder / "members" / name) for name in names if (folder / "members" / name / "config.json").is_file()]
    found = [summary for summary in own if summary is not None]
    states = [summary.state for summary in found]
    finished, diverged = states.count("finished"), states.count("diverged")
    state: State = "finished" if finished + diverged == len(names) else "interrupted"
    if is_taken(folder):
        state = "running"
    note = f"{diverged} diverged" if diverged else ""
    yield RunSummary(folder, "sweep", state, finished, len(names), settings, note=note)
    if members:
        yield from found


def _label(values: Mapping[str, Any], base: type[Kind]) -> str:
    """What a kind is called in tables; one of a user's own, whose class is not loaded, by the name of its class."""
    name = str(values["kind"])
    return name.rpartition(":")[2] if ":" in name or base is Kind else configs.from_dict(dict(values), base).name


def as_text(summaries: Sequence[RunSummary], folder: str | Path = "") -> str:
    """The list as a table for a terminal; names begin below `folder`."""
    named = [name for name in NUMBERS if any(name in summary.numbers for summary in summaries)]
    rows = [["folder", "state", "steps", "data", "network", "σ²", "β", "seed", *(NUMBERS[name] for name in named), ""]]
    for summary in summaries:
        own = summary.settings
        settings = [str(own.get(name, "")) for name in ("data", "network", "decoder_variance")]
        settings += [f"{own[name]:g}" if name in own else "" for name in ("beta", "seed")]
        numbers = [f"{summary.numbers[name]:.5g}" if name in summary.numbers else "" for name in named]
        place = os.path.relpath(summary.folder, folder) if folder else str(summary.folder)
        rows.append([place, summary.state, summary.progress(), *settings, *numbers, summary.note])
    return aligned(rows)
