"""What a run was found to be worth: `evaluation.json`, and the variance of its training set in `calibration.npz`."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bsvae_jax._io.files import read_json, sense_of, write_json
from bsvae_jax.evaluation.metrics import Report, as_json, from_json
from bsvae_jax.evaluation.scores import Calibration
from bsvae_jax.training.identity import check_run, identity, read_run_arrays


def read_calibration(folder: Path) -> Calibration | None:
    """Read `calibration.npz`; None before the run has ended."""
    path = folder / "calibration.npz"
    if not path.is_file():
        return None
    remedy = "delete it, and `bsvae train` or `bsvae evaluate` measures it again"
    values = read_run_arrays(path, remedy)
    with sense_of(path, remedy):
        per_pixel = values["variance_per_pixel"]
        return Calibration(int(values["step"]), float(values["variance"]), per_pixel, float(values["floor"]))


class Evaluation(NamedTuple):
    """What `evaluation.json` says."""

    step: int
    report: Report
    findings: dict[str, str]
    """What is wrong with the model, by the name of the finding (`diagnosis`)."""


def _file(folder: Path, checkpoint: str) -> Path:
    """The numbers of the best checkpoint have a file of their own, beside those by which a run is finished and compared."""
    return folder / ("evaluation.json" if checkpoint == "latest" else f"evaluation_{checkpoint}.json")


def read_evaluation(folder: Path, checkpoint: str = "latest") -> Evaluation | None:
    """Read `evaluation.json`, or of the checkpoint 'best' `evaluation_best.json`; None before that was evaluated.

    Raises:
      UserError: a damaged file.
    """
    path = _file(folder, checkpoint)
    if not path.is_file():
        return None
    remedy = "delete it and evaluate again"
    with read_json(path, remedy) as values:
        check_run(path, values, remedy)
        if values["checkpoint"] != checkpoint:  # earlier versions kept one file for both
            return None
        findings = {str(name): str(sentence) for name, sentence in values.get("findings", {}).items()}
        return Evaluation(int(values["step"]), from_json(values["splits"]), findings)


def evaluation_at(folder: Path, step: int) -> Report:
    """The report of `evaluation.json` for the parameters of a step; empty where it is of others."""
    evaluation = read_evaluation(folder)
    return evaluation.report if evaluation is not None and evaluation.step == step else {}


def write_evaluation(
    folder: Path, step: int, report: Report, checkpoint: str = "latest", findings: Mapping[str, str] | None = None
) -> None:
    """Write what `read_evaluation` reads; splits, quantities and findings from before, for the same parameters, stay."""
    known = read_evaluation(folder, checkpoint)
    before, found = (known.report, known.findings) if known is not None and known.step == step else ({}, {})
    findings = found if findings is None else findings
    kept = {split: dict(quantities) for split, quantities in before.items()}
    for split, quantities in report.items():
        if "posterior_samples" in quantities:  # of one sample there is no error
            kept.setdefault(split, {}).pop("sampling_error", None)
        kept[split] = kept.get(split, {}) | quantities
    _write(folder, checkpoint, Evaluation(step, kept, dict(findings)))


def _write(folder: Path, checkpoint: str, evaluation: Evaluation) -> None:
    step, report, findings = evaluation
    values = {"run": identity(folder), "step": step, "checkpoint": checkpoint, "findings": findings, "splits": as_json(report)}
    write_json(_file(folder, checkpoint), values)


def without(report: Report, prefix: str) -> Report:
    """The report but for the quantities whose names begin with `prefix`."""
    return {split: {name: q for name, q in own.items() if not name.startswith(prefix)} for split, own in report.items()}


def forget_quantities(folder: Path, prefix: str) -> None:
    """Leave out of what `write_evaluation` has written the quantities whose names begin with `prefix`."""
    for checkpoint in ("latest", "best"):
        known = read_evaluation(folder, checkpoint)
        if known is None or not any(name.startswith(prefix) for quantities in known.report.values() for name in quantities):
            continue
        _write(folder, checkpoint, known._replace(report=without(known.report, prefix)))


def forget_later(folder: Path, step: int) -> None:
    """Remove what is known of parameters after `step`, which is the last that there are: other steps will lead there."""
    calibration = read_calibration(folder)
    if calibration is not None and calibration.step > step:
        (folder / "calibration.npz").unlink()
    for checkpoint in ("latest", "best"):
        known = read_evaluation(folder, checkpoint)
        if known is not None and known.step > step:
            _file(folder, checkpoint).unlink()
