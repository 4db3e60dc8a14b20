"""Callbacks: what hooks are told and when, runs and members that they stop, errors that they raise, and trackers."""

import dataclasses
import json
import logging
import struct
import sys
from pathlib import Path

import chex
import numpy as np
import pytest

import bsvae_jax as bv
from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import MLP, Config, Digits, Optimal
from bsvae_jax.errors import UserError
from bsvae_jax.training.callbacks import Run, StartWatch
from bsvae_jax.training.evaluated import read_evaluation
from bsvae_jax.training.program import Program
from bsvae_jax.training.stopped import read_stopped

CONFIG = Config(
    data=Digits(validation=None), network=MLP((8,)), latent_size=2, epochs=4, batch_size=500, devices=1, evaluate_every=2
)  # 3 steps an epoch
GRID = bv.Sweep(beta=(0.5, 1.0, 2.0), decoder_variance=(Optimal(),), seeds=1)
NAMES = [f"optimal_beta{beta}_seed0" for beta in ("0.5", "1", "2")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return bv.fit(CONFIG, tmp_path_factory.mktemp("whole") / "run", progress=False)


@pytest.fixture
def steps(monkeypatch):
    """Numbers of steps that were dispatched."""
    taken, take = [], Program.take_steps

    def counted(self, state, batches, count, *rest):
        taken.append(count)
        return take(self, state, batches, count, *rest)

    monkeypatch.setattr(Program, "take_steps", counted)
    return taken


class Recorder(bv.Callback):
    """Notes all that it is told."""

    def __init__(self):
        self.told = []

    def on_start(self, run, history):
        self.told.append(("start", run.name, run.step, history))

    def on_steps(self, run, step, metrics):
        self.told.append(("steps", run.name, step, dict(metrics)))

    def on_metrics(self, run, row):
        self.told.append(("metrics", run.name, row["step"], row))

    def on_evaluation(self, run, row):
        self.told.append(("evaluation", run.name, row["step"], row))

    def on_checkpoint(self, run, step):
        self.told.append(("checkpoint", run.name, step, None))

    def on_end(self, run, report):
        self.told.append(("end", run.name, sorted(report), None))


class Asks(bv.Callback):
    """Asks to stop a run at the first row of one kind from a step on."""

    def __init__(self, hook, step, name=None):
        self.step, self.name = step, name
        setattr(self, hook, self.ask)

    def ask(self, run, row):
        return f"enough at {row['step']}" if row["step"] >= self.step and self.name in (None, run.name) else None


class Raises(bv.Callback):
    def __init__(self, hook, error=ValueError):
        self.error, self.fired = error, False
        setattr(self, hook, self.fail)

    def fail(self, *arguments):
        if not self.fired:
            self.fired = True
            raise self.error("out of paper")


def parameters(folder):
    return bv.restore(folder).variables


# --- What hooks are told ----------------------------------------------------------------------------------------------


def test_hooks_are_told_what_happens_in_order_in_plain_values(tmp_path):
    recorder = Recorder()
    result = bv.fit(dataclasses.replace(CONFIG, steps_per_dispatch=2), tmp_path / "run", False, [recorder])
    assert [(what, step) for what, _, step, _ in recorder.told] == [
        ("start", 0),
        *[("steps", 2), ("steps", 3), ("metrics", 3)],
        *[("steps", 5), ("steps", 6), ("metrics", 6), ("evaluation", 6), ("checkpoint", 6)],
        *[("steps", 8), ("steps", 9), ("metrics", 9)],
        *[("steps", 11), ("steps", 12), ("metrics", 12), ("evaluation", 12), ("checkpoint", 12)],
        ("end", ["test", "train"]),
    ]
    assert {name for _, name, _, _ in recorder.told} == {"run"}
    json.dumps([values for *_, values in recorder.told])  # no array among them
    rows = [values for what, _, _, values in recorder.told if what in ("metrics", "evaluation")]
    assert all(row.pop("images_per_second") > 0 for row in rows if row["split"] == "train")
    assert rows == read_metrics(result.workdir)
    last = [values for what, _, step, values in recorder.told if what == "steps" and step == 3]
    assert last[0].keys() == {"objective", "distortion", "rate", "mse", "variance", "gradient_norm", "beta"}


@pytest.mark.long
def test_a_run_that_is_continued_tells_what_was_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        bv.fit(CONFIG, tmp_path / "run", False, [Stopper(6)])
    before = [row for row in read_metrics(tmp_path / "run") if row["step"] <= 6]
    recorder = Recorder()
    bv.fit(CONFIG, tmp_path / "run", False, [recorder])
    assert recorder.told[0] == ("start", "run", 6, before)


class Stopper(bv.Callback):
    """Interrupts as a kill would, once the checkpoint of a step is on the disk."""

    def __init__(self, step):
        self.step = step

    def on_metrics(self, run, row):
        if row["step"] > self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("wrong", [bv.Callback, print, "tensorboard"])
def test_what_is_no_callback_is_refused(wrong, tmp_path, unchecked):
    with pytest.raises(UserError, match=r"callbacks must be instances of classes derived from bsvae_jax\.Callback"):
        bv.fit(CONFIG, tmp_path / "run", False, [wrong])
    with pytest.raises(UserError, match=r"callbacks must be of type Sequence.*give a list, callbacks="):
        bv.fit(CONFIG, tmp_path / "run", False, bv.Callback())
    with pytest.raises(UserError, match="callbacks must be instances"):
        bv.fit_sweep(CONFIG, GRID, tmp_path / "run", progress=False, callbacks=[wrong])
    assert not (tmp_path / "run").exists()


# --- Runs that callbacks stop -----------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("hook", "step"), [("on_metrics", 3), ("on_evaluation", 6)])
def test_a_run_that_is_stopped_is_evaluated_saved_and_not_trained_again(hook, step, whole, tmp_path, steps):
    folder = tmp_path / "run"
    result = bv.fit(CONFIG, folder, False, [Asks(hook, 1)])
    assert (int(result.state.step), bv.restore(folder).step, sum(steps)) == (step, step, step)
    assert read_stopped(folder) == (step, f"Asks: enough at {step}")
    evaluation = read_evaluation(folder)
    assert (evaluation.step, evaluation.report) == (step, result.report)
    assert set(result.report) == {"train", "test"}
    assert read_metrics(folder)[-1]["split"] == "test"
    files = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "evaluation.json", "calibration.npz")}
    again = bv.fit(CONFIG, folder, False)
    assert sum(steps) == step
    assert again.report == result.report
    assert files == {name: (folder / name).read_bytes() for name in files}
    # Without the mark it goes on, to the numbers of a run that was never stopped.
    (folder / "stopped.json").unlink()
    ended = bv.fit(CONFIG, folder, False)
    assert sum(steps) == 12
    chex.assert_trees_all_equal(ended.state.arrays(), whole.state.arrays())
    assert ended.report == whole.report


@pytest.mark.long
def test_a_run_that_is_stopped_before_its_first_step_is_read_again_and_goes_on(whole, tmp_path, steps):
    class Never(bv.Callback):
        def on_start(self, run, history):
            return None if history else "not today"

    folder = tmp_path / "run"
    result = bv.fit(CONFIG, folder, False, [Never()])
    assert (int(result.state.step), sum(steps), read_stopped(folder).step) == (0, 0, 0)
    assert bv.fit(CONFIG, folder, False).report == result.report
    assert [(run.state, run.step) for run in bv.list_runs(folder)] == [("finished", 0)]
    (folder / "stopped.json").unlink()
    assert bv.fit(CONFIG, folder, False).report == whole.report


@pytest.mark.long
def test_a_stopped_run_that_lost_its_evaluation_is_evaluated_and_not_trained(tmp_path, steps):
    folder = tmp_path / "run"
    first = bv.fit(CONFIG, folder, False, [Asks("on_evaluation", 1)])
    (folder / "evaluation.json").unlink()
    assert bv.fit(CONFIG, folder, False).report == first.report
    assert sum(steps) == 6


@pytest.mark.long
def test_to_stop_at_the_last_step_is_to_end(whole, tmp_path):
    result = bv.fit(CONFIG, tmp_path / "run", False, [Asks("on_evaluation", 12)])
    assert not (tmp_path / "run" / "stopped.json").exists()
    assert result.report == whole.report


@pytest.mark.long
@pytest.mark.parametrize("execution", ["scan", "vmap", "loop"])
def test_one_member_of_a_sweep_stops_and_the_others_go_on(execution, tmp_path, steps):
    asks = Asks("on_metrics", 2, NAMES[1])
    bv.fit_sweep(CONFIG, GRID, tmp_path / "all", execution, progress=False)
    count = sum(steps)
    result = bv.fit_sweep(CONFIG, GRID, tmp_path / "some", execution, progress=False, callbacks=[asks])
    assert (result.finished, result.failed) == (NAMES, {})
    stopped = tmp_path / "some" / "members" / NAMES[1]
    assert (bv.restore(stopped).step, read_stopped(stopped).step, read_evaluation(stopped).step) == (3, 3, 3)
    for name in (NAMES[0], NAMES[2]):
        ours, theirs = tmp_path / "some" / "members" / name, tmp_path / "all" / "members" / name
        chex.assert_trees_all_equal(parameters(ours), parameters(theirs))
        assert (ours / "evaluation.json").read_bytes() == (theirs / "evaluation.json").read_bytes()
        assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
    # What the stopped one reports is what it reports alone.
    alone = bv.fit(dataclasses.replace(CONFIG, beta=1.0), tmp_path / "alone", False, [Asks("on_metrics", 2)])
    report = read_evaluation(stopped).report["test"]
    for name, quantity in alone.report["test"].items():
        assert report[name].value == pytest.approx(quantity.value, rel=1e-4, abs=1e-5), name
    assert np.load(stopped / "pictures.npz")["latent_rate"].shape == (2,)
    trained = sum(steps)
    assert bv.fit_sweep(CONFIG, GRID, tmp_path / "some", execution, progress=False) == result
    assert sum(steps) == trained > count


@pytest.mark.long
@pytest.mark.parametrize("interrupted", [False, True])
def test_early_stopping_counts_evaluations_without_improvement(interrupted, tmp_path):
    """The first evaluation improves on nothing; none after it by a million nats. At the third, two in a row have not."""
    config = dataclasses.replace(CONFIG, epochs=8, evaluate_every=1)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            bv.fit(config, tmp_path / "run", False, [Stopper(6)])
    result = bv.fit(config, tmp_path / "run", False, [bv.EarlyStopping(2, min_improvement=1e6)])
    assert int(result.state.step) == 9
    assert read_stopped(tmp_path / "run").reason == ("EarlyStopping: the held-out objective has not improved for 2 evaluations")
    assert [row["step"] for row in read_metrics(tmp_path / "run") if row["split"] == "test"] == [3, 6, 9]


@pytest.mark.long
def test_early_stopping_lets_a_run_go_on_that_improves(whole, tmp_path):
    assert bv.fit(CONFIG, tmp_path / "run", False, [bv.EarlyStopping(1)]).report == whole.report


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"patience": 0}, "patience must be a whole number >= 1, got 0"),
        ({"patience": 1, "min_improvement": -1.0}, "min_improvement must be a finite number >= 0, got -1.0"),
        ({"patience": 1, "min_improvement": float("nan")}, "min_improvement must be a finite number"),
        ({"patience": 1, "term": "loss"}, "term must be one of objective, distortion, rate, mse, got 'loss'"),
    ],
)
def test_early_stopping_that_makes_no_sense_is_refused(arguments, sentence, unchecked):
    with pytest.raises(UserError, match=sentence):
        bv.EarlyStopping(**arguments)


# --- Callbacks that raise ---------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("hook", "step"), [("on_steps", 3), ("on_metrics", 3), ("on_evaluation", 6), ("on_checkpoint", 6)])
def test_a_callback_that_raises_loses_nothing(hook, step, whole, tmp_path):
    folder, recorder = tmp_path / "run", Recorder()
    with pytest.raises(
        bv.CallbackError, match=rf"Raises.{hook} raised ValueError: out of paper. The run is saved at step {step}"
    ) as e:
        bv.fit(CONFIG, folder, False, [Raises(hook), recorder])
    assert isinstance(e.value.__cause__, ValueError)
    assert bv.restore(folder).step == step
    assert recorder.told[-1] == ("end", "run", [], None)
    ended = bv.fit(CONFIG, folder, False)
    chex.assert_trees_all_equal(ended.state.arrays(), whole.state.arrays())
    assert read_metrics(folder) == read_metrics(whole.workdir)


@pytest.mark.long
def test_a_callback_that_raises_at_the_start_or_the_end(whole, tmp_path, steps):
    with pytest.raises(bv.CallbackError, match=r"Raises.on_start raised ValueError: out of paper. Nothing was trained."):
        bv.fit(CONFIG, tmp_path / "run", False, [Raises("on_start")])
    assert not steps
    with pytest.raises(bv.CallbackError, match=r"Raises.on_end raised ValueError: out of paper. The run has come to its end."):
        bv.fit(CONFIG, tmp_path / "run", False, [Raises("on_end")])
    assert bv.fit(CONFIG, tmp_path / "run", False).report == whole.report
    assert sum(steps) == 12


@pytest.mark.long
def test_a_callback_that_raises_in_a_sweep_saves_all_members(tmp_path):
    with pytest.raises(bv.CallbackError, match=r"Raises\.on_metrics raised ValueError"):
        bv.fit_sweep(CONFIG, GRID, tmp_path / "sweep", "scan", progress=False, callbacks=[Raises("on_metrics")])
    assert [bv.restore(tmp_path / "sweep" / "members" / name).step for name in NAMES] == [3, 3, 3]
    assert bv.fit_sweep(CONFIG, GRID, tmp_path / "sweep", "scan", progress=False).finished == NAMES


# --- What is said -----------------------------------------------------------------------------------------------------


def test_a_run_without_progress_says_nothing_but_to_who_listens(tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, "bsvae_jax"):
        bv.fit(CONFIG, tmp_path / "run", progress=False)
    assert capsys.readouterr() == ("", "")
    assert "digits: 1,500 training and 297 test images (8, 8, 1); 4 epochs, 12 steps of 500" in caplog.text
    assert not logging.getLogger("bsvae_jax").handlers


@pytest.mark.long
def test_progress_shows_what_is_logged_once(tmp_path, capsys):
    bv.fit(CONFIG, tmp_path / "run", progress=True)
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.splitlines()[0].startswith("digits: 1,500 training and 297 test images")
    assert errors.count("digits: 1,500") == 1


@pytest.mark.parametrize(
    ("step", "rate", "warns"), [(50, 13.0, True), (50, 11.0, False), (100, 13.0, False), (50, None, False)]
)
def test_a_rate_of_six_nats_a_latent_in_the_first_steps_is_told(step, rate, warns, caplog):
    StartWatch().on_metrics(Run("run", Path("run"), CONFIG, 0, 200), {"epoch": 1, "step": step, "rate": rate})
    assert [record.getMessage()[:62] for record in caplog.records] == warns * [
        "run: the rate of the first 50 steps is 13 nats, 6 of each late"
    ]


@pytest.mark.long
def test_every_run_is_watched_at_its_start(tmp_path, caplog, monkeypatch):
    bv.fit(CONFIG, tmp_path / "usual", progress=False)
    assert "training begins badly" not in caplog.text
    monkeypatch.setattr(StartWatch, "NATS_PER_LATENT", 0.0)
    bv.fit(CONFIG, tmp_path / "run", progress=False)
    assert caplog.text.count("run: the rate of the first 3 steps is") == 1


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def records(path):
    """The records of wandb's transaction log: 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    content, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 2**15 - position % 2**15 < 7:
            position += 2**15 - position % 2**15
        length, kind = struct.unpack_from("<HB", content, position + 4)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or the last part
            yield whole
            whole = b""


def test_weights_and_biases_gets_every_row(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_SILENT", "true")
    result = bv.fit(CONFIG, tmp_path / "run", False, [bv.WandbTracker("digits", mode="offline")])
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    logged = {}
    for record in map(Record.FromString, records(path)):
        for item in record.history.item:
            logged.setdefault(item.key or ".".join(item.nested_key), []).append(json.loads(item.value_json))
    rows = read_metrics(result.workdir)
    for split in ("train", "test"):
        assert logged[f"{split}/objective"] == [row["objective"] for row in rows if row["split"] == split]
    assert sorted(set(logged["_step"])) == [3, 6, 9, 12]


def test_without_wandb_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'bsvae_jax\[wandb\]'"):
        bv.WandbTracker()
