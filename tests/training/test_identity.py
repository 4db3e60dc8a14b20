"""A run folder that is not what it says: each of its files tells which run and which step it is of."""

import json
import shutil

import numpy as np
import pytest

import bsvae_jax as bv
from bsvae_jax._io.files import read_json, write_json
from bsvae_jax.config import MLP, Config, Digits
from bsvae_jax.errors import UserError
from bsvae_jax.objective import Constant
from bsvae_jax.sweeps.fit_sweep import fit_sweep
from bsvae_jax.sweeps.grid import Sweep
from bsvae_jax.sweeps.info import read_sweep
from bsvae_jax.sweeps.results import read_results
from bsvae_jax.training.evaluated import read_evaluation
from bsvae_jax.training.identity import identity
from bsvae_jax.training.metrics_log import incomplete_epochs
from bsvae_jax.training.workdir import read_info

CONFIG = Config(data=Digits(validation=None), network=MLP((8,)), latent_size=2, epochs=2, batch_size=500, devices=1)
SWEEP = Sweep(beta=(1.0, 4.0), decoder_variance=(Constant(0.1),), seeds=1)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of two runs of one model, beta 1 and 4."""
    folder = tmp_path_factory.mktemp("identity") / "sweep"
    fit_sweep(CONFIG, SWEEP, folder, progress=False)
    return folder


@pytest.fixture
def runs(swept, tmp_path):
    """Copies of the two."""
    copy = shutil.copytree(swept, tmp_path / "sweep")
    return [copy / "members" / f"constant-0.1_beta{beta}_seed0" for beta in (1, 4)]


def replace(run, other, name):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (shutil.copytree if path.suffix == "" else shutil.copy)(other / name, path)


@pytest.mark.long
def test_sound_runs_are_opened(runs):
    assert identity(runs[0]) != identity(runs[1])
    assert [read_info(run).config.beta for run in runs] == [1.0, 4.0]
    assert [bv.restore(run).calibration.step for run in runs] == [6, 6]
    assert len(read_results(runs[0].parents[1]).members) == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("checkpoints", bv.restore),
        ("checkpoints", lambda run: bv.fit(read_info(run).config, run, progress=False)),
        ("calibration.npz", bv.restore),
        ("evaluation.json", read_evaluation),
        ("pictures.npz", lambda run: read_results(run.parents[1])),
        ("per_image.npz", lambda run: read_results(run.parents[1])),
    ],
)
def test_files_of_another_run(name, use, runs):
    replace(*runs, name)
    before = {path: path.read_bytes() for path in runs[0].rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError, match=rf"{name}.* of another run than the config\.json"):
        use(runs[0])
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.long
@pytest.mark.parametrize("step", [3, 12])
def test_a_checkpoint_of_another_step(step, runs):
    checkpoints = runs[0] / "checkpoints"
    shutil.rmtree(checkpoints / "3")
    (checkpoints / "6").rename(checkpoints / str(step))
    for use in (bv.restore, lambda run: bv.fit(read_info(run).config, run, progress=False)):
        with pytest.raises(UserError, match=rf"checkpoints/{step} .*it was saved as step 6"):
            use(runs[0])
    assert (checkpoints / str(step)).is_dir()


def paths_of(values, place=()):
    """Places of all values in nested dictionaries."""
    for name, value in values.items():
        yield from paths_of(value, (*place, name)) if isinstance(value, dict) and value else [(*place, name)]


def every_edit(content):
    """A JSON text with one value changed, or left out, for each value; but for the digest."""
    for *place, last in paths_of(json.loads(content)):
        for change in (None, 3, "other"):
            values = json.loads(content)
            inner = values
            for name in place:
                inner = inner[name]
            if last == "digest" or inner[last] == change:
                continue
            if change == "other":
                del inner[last]
            else:
                inner[last] = change
            yield json.dumps(values)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", read_info),
        ("evaluation.json", read_evaluation),
        ("../../sweep.json", lambda run: read_sweep(run.parents[1])),
    ],
)
def test_no_edit_is_silent(name, read, runs):
    path = runs[0] / name
    content = path.read_text()
    read(runs[0])
    edits = list(every_edit(content))
    assert len(edits) > 15
    for edit in edits:
        path.write_text(edit)
        with pytest.raises(UserError, match=r"is damaged \(ValueError: it was changed after it was written\)"):
            read(runs[0])


def test_files_of_earlier_versions_have_no_digest(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    with read_json(tmp_path / "a.json") as values:
        assert values == {"a": 1}
    write_json(tmp_path / "a.json", {"a": 1.5, "b": [0.1, float("inf")], "c": None})
    with read_json(tmp_path / "a.json") as values:
        assert values.items() >= {"a": 1.5, "c": None}.items()


@pytest.mark.parametrize(
    ("left_out", "epochs", "step", "expected"),
    [
        ([], 4, 12, []),
        ([(6, "train")], 4, 12, [2]),
        ([(6, "test")], 4, 12, [2]),
        ([(3, "test"), (9, "test")], 4, 12, []),  # none was due
        ([(9, "train"), (12, "test")], 4, 11, [3]),
        ([(9, "train"), (12, "test")], 4, 12, [3, 4]),
    ],
)
def test_rows_that_are_missing(left_out, epochs, step, expected):
    config = Config(data=Digits(validation=None), epochs=epochs, evaluate_every=2, batch_size=500)
    rows = [{"step": 3 * epoch, "split": split} for epoch in range(1, 5) for split in ("train", "test")]
    rows = [row for row in rows if (row["step"], row["split"]) not in left_out]
    assert incomplete_epochs(rows, config, 1500, step) == expected


@pytest.mark.parametrize(
    ("left_out", "step", "expected"),
    [
        ([], 12, []),
        ([(2, "train")], 12, [1]),
        ([(2, "train"), (3, "train")], 12, [1]),
        ([(5, "train"), (6, "train"), (8, "train")], 12, [2, 3]),
        ([(11, "train")], 11, [4]),  # the last one before a pause
        ([(9, "train")], 8, []),
        ([(2, "test"), (9, "test")], 12, []),
    ],
)
@pytest.mark.parametrize("said", [True, False], ids=["", "of an earlier version"])
def test_rows_that_are_missing_within_an_epoch(left_out, step, expected, said):
    config = Config(data=Digits(validation=None), epochs=4, evaluate_every=2, batch_size=500)
    # Two rows an epoch, of two steps and of one, and evaluations at all their ends.
    rows = [{"step": 3 * epoch + end, "split": split, "steps": steps} for epoch in range(4) for end, steps in ((2, 2), (3, 1))
            for split in ("train", "test")]  # fmt: skip
    rows = [row for row in rows if (row["step"], row["split"]) not in left_out and row["step"] <= step]
    if not said:
        rows = [{name: value for name, value in row.items() if name != "steps"} for row in rows]
        expected = [epoch for epoch in (1, 2, 3, 4) if 3 * epoch <= step and (3 * epoch, "train") in left_out] + [4] * (
            step == 11 and expected != []
        )
    assert incomplete_epochs(rows, config, 1500, step) == expected


def test_missing_rows_are_said(runs, caplog):
    path = runs[0] / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert [row["steps"] for row in map(json.loads, lines) if row["split"] == "train"] == [3, 3]
    for kept, warned in ((lines, False), (lines[: len(lines) // 2], True), ([], True), (lines[1:], True)):
        path.write_bytes(b"".join(kept))
        caplog.clear()
        bv.fit(read_info(runs[0]).config, runs[0], progress=False)
        assert any("lacks rows of" in record.getMessage() for record in caplog.records) == warned


def test_the_digest_is_that_of_the_values(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2], "a": "x"})
    values = json.loads((tmp_path / "a.json").read_text())
    # sha256sum of {"a": "x", "b": [1, 2]}
    assert values["digest"] == DIGEST
    np.testing.assert_equal(values["b"], [1, 2])


DIGEST = "5125d018f84d57c49a8d3c2cfa6063d23cc3f4cd7ff13f4fdedfa2c1d3162f30"
