"""A run that goes on under a changed config: trained longer, or at another learning rate."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest

import bsvae_jax as bv
from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import MLP, Config, Digits, Optimizer
from bsvae_jax.errors import UserError
from bsvae_jax.training.changes import check_change, describe_change
from bsvae_jax.training.checkpoints import saved_steps
from bsvae_jax.training.evaluated import read_evaluation
from bsvae_jax.training.identity import identities, identity
from bsvae_jax.training.workdir import read_info

CONSTANT = Optimizer(ema_decay=0.9, schedule="constant")
SHORT = Config(
    data=Digits(validation=None), network=MLP((16,)), latent_size=4, epochs=2, batch_size=500, devices=1, optimizer=CONSTANT
)
LONG = dataclasses.replace(SHORT, epochs=4)  # 3 steps an epoch


class Halt(bv.Callback):
    """Ends a call as an interruption does, at the first evaluation."""

    def on_evaluation(self, run, row):
        raise RuntimeError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two epochs and one of four, of a constant learning rate."""
    folder = tmp_path_factory.mktemp("changes")
    return {epochs: bv.fit(config, folder / str(epochs), progress=False) for epochs, config in ((2, SHORT), (4, LONG))}


def with_optimizer(config, **changes):
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **changes))


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# --- What may change --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "step", "sentence"),
    [
        (LONG, 6, None),
        (with_optimizer(LONG, learning_rate=1e-4, schedule="cosine", warmup_steps=5, weight_decay=0.0), 6, None),
        (with_optimizer(SHORT, learning_rate=1e-4), 3, None),
        (dataclasses.replace(SHORT, epochs=1), 3, None),
        (
            dataclasses.replace(LONG, beta=2.0),
            6,
            "another config (beta: 1.0 -> 2.0; epochs: 2 -> 4). Choose that config, or another --workdir, with --start-",
        ),
        (with_optimizer(LONG, gradient_clip=1.0), 6, "another config (epochs: 2 -> 4; optimizer.gradient_clip: None -> 1.0)"),
        (with_optimizer(LONG, ema_decay=None), 6, "a run that goes on may change epochs, optimizer.learning_rate, "),
        (dataclasses.replace(LONG, batch_size=100), 6, "another config (batch_size: 500 -> 100; epochs: 2 -> 4)"),
        (
            dataclasses.replace(SHORT, epochs=1),
            4,
            "has trained for 4 steps, so that it cannot end with epoch 1 (epochs: 2 -> 1).",
        ),
        (dataclasses.replace(SHORT, epochs=1), 6, "Give --epochs 2 or more, or another --workdir."),
        (
            with_optimizer(SHORT, learning_rate=1e-4),
            6,
            "run has taken its last step, 6, so that this would change nothing: optimizer.learning_rate: 0.001 -> 0.0001. Give",
        ),
    ],
)
def test_what_may_change(wanted, step, sentence):
    if sentence is None:
        return check_change(Path("run"), SHORT, wanted, step, 1500)
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_change(Path("run"), SHORT, wanted, step, 1500)
    return None


@pytest.mark.long
@pytest.mark.parametrize(
    ("schedule", "wanted", "step", "sentence"),
    [
        # By hand: 1e-3 (1 + cos(pi 6/12)) / 2 = 5e-4 after 1e-3 (1 + cos(pi 5/6)) / 2 = 6.7e-5.
        ("cosine", {}, 6, "a cosine schedule over all 12 steps, as if that had been given from the beginning: 0.0005 at the "
         "next step, after 6.7e-05 at the last."),
        ("constant", {}, 6, "a constant schedule over all 12 steps, as if that had been given from the beginning: 0.001 at the "
         "next step, after 0.001 at the last."),
        ("constant", {"learning_rate": 1e-4}, 0, "0.0001 at the next step."),
    ],
)  # fmt: skip
def test_what_the_learning_rate_does_is_said(schedule, wanted, step, sentence):
    saved = with_optimizer(SHORT, schedule=schedule)
    said = describe_change(Path("run"), saved, with_optimizer(dataclasses.replace(saved, epochs=4), **wanted), step, 1500)
    assert said.startswith(f"run goes on after step {step} with epochs: 2 -> 4")
    assert said.endswith(sentence)


# --- Longer -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_longer_run_is_the_one_that_was_as_long_from_the_beginning(runs, tmp_path, caplog):
    """Of a constant learning rate, to the bit; of the run before, all rows and files stay and are its own."""
    folder = shutil.copytree(runs[2].workdir, tmp_path / "run")
    before = identity(folder)
    with caplog.at_level("INFO", "bsvae_jax"):
        longer = bv.fit(LONG, folder, progress=False)
    chex.assert_trees_all_equal(longer.state.arrays(), runs[4].state.arrays())
    assert longer.report == runs[4].report
    assert read_metrics(folder) == read_metrics(runs[4].workdir)
    assert "goes on after step 6 with epochs: 2 -> 4. Its learning rate" in caplog.text
    info = read_info(folder)
    assert info.config == LONG
    assert info.changes == ((6, ("epochs: 2 -> 4",), before),)
    assert info.provenance() == ["It went on after step 6 with epochs: 2 -> 4."]
    assert identities(folder) == [json.loads((folder / "config.json").read_text())["digest"], before]
    assert len(set(identities(folder))) == 2
    assert read_evaluation(folder).step == bv.restore(folder).step == 12
    content = files_of(folder)
    assert bv.fit(LONG, folder, progress=False).report == longer.report  # repeated, it is finished
    assert files_of(folder)[folder / "config.json"] == content[folder / "config.json"]
    with pytest.raises(UserError, match="has trained for 12 steps"):
        bv.fit(SHORT, folder, progress=False)
    assert files_of(folder)[folder / "config.json"] == content[folder / "config.json"]


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_an_interruption_around_the_change_loses_nothing(when, runs, tmp_path, monkeypatch):
    """A kill before the record is written, just after, or an interruption some epochs on."""
    folder = shutil.copytree(runs[2].workdir, tmp_path / "run")
    checkpoints = saved_steps(folder / "checkpoints")

    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        if when == "before":
            patch.setattr("bsvae_jax.training.workdir.with_change", killed)
        elif when == "after":
            patch.setattr("bsvae_jax.training.trainer.data_order", killed)
        with pytest.raises((Killed, bv.CallbackError)):
            bv.fit(LONG, folder, progress=False, callbacks=[Halt()] if when == "later" else [])
    assert read_info(folder).config.epochs == (2 if when == "before" else 4)
    assert bv.restore(folder).step == (9 if when == "later" else 6)  # under the config of now, or of before
    if when != "later":
        assert saved_steps(folder / "checkpoints") == checkpoints
        assert read_evaluation(folder).step == 6
        assert bv.fit(SHORT, shutil.copytree(folder, tmp_path / "back"), progress=False).report == runs[2].report
    chex.assert_trees_all_equal(bv.fit(LONG, folder, progress=False).state.arrays(), runs[4].state.arrays())
    assert [change.step for change in read_info(folder).changes] == [6]
    assert read_metrics(folder) == read_metrics(runs[4].workdir)


@pytest.mark.long
def test_the_learning_rate_of_a_run_that_goes_on(tmp_path):
    """Against the cosine by hand: two epochs of a run of four at a peak of 1e-3, then four to the sixth at 1e-4."""
    cosine = with_optimizer(LONG, schedule="cosine")
    with pytest.raises(bv.CallbackError):
        bv.fit(cosine, tmp_path / "run", progress=False, callbacks=[Halt()])
    lower = with_optimizer(dataclasses.replace(cosine, epochs=6), learning_rate=1e-4)
    bv.fit(lower, tmp_path / "run", progress=False)
    rows = [row for row in read_metrics(tmp_path / "run") if row["split"] == "train"]
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 15, 18]
    expected = [1e-3 * (1 + np.cos(np.pi * 2 / 12)) / 2]
    expected += [1e-4 * (1 + np.cos(np.pi * step / 18)) / 2 for step in (5, 8, 11, 14, 17)]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], expected, rtol=1e-5)
    (change,) = read_info(tmp_path / "run").changes
    assert change[:2] == (3, ("epochs: 4 -> 6", "optimizer.learning_rate: 0.001 -> 0.0001"))


@pytest.mark.long
def test_a_run_that_was_stopped_early_goes_on_with_more_epochs(runs, tmp_path):
    class Enough(bv.Callback):
        def on_evaluation(self, run, row):
            return "enough"

    bv.fit(SHORT, tmp_path / "run", progress=False, callbacks=[Enough()])
    assert (tmp_path / "run" / "stopped.json").is_file()
    chex.assert_trees_all_equal(bv.fit(LONG, tmp_path / "run", progress=False).state.arrays(), runs[4].state.arrays())
    assert not (tmp_path / "run" / "stopped.json").exists()


@pytest.mark.long
def test_steps_that_are_taken_again_are_recorded(runs, tmp_path):
    """The checkpoint after which the config was changed is lost: the change holds from the one before it."""
    folder = shutil.copytree(runs[2].workdir, tmp_path / "run")
    with pytest.raises(bv.CallbackError):
        bv.fit(LONG, folder, progress=False, callbacks=[Halt()])
    for step in (6, 9):
        shutil.rmtree(folder / "checkpoints" / str(step))
    steps = saved_steps(folder / "checkpoints")
    bv.fit(LONG, folder, progress=False)
    first, again = read_info(folder).changes
    assert first.step == again.step == max(steps, default=0) < 6
    assert (first.changed, again.changed[0][:9]) == (("epochs: 2 -> 4",), "the steps")


@pytest.mark.long
def test_numbers_of_steps_that_are_taken_otherwise_are_not_those_of_the_run(runs, tmp_path):
    """The last checkpoint is lost, and the run goes on at another learning rate to a step that was evaluated before."""
    folder = shutil.copytree(runs[4].workdir, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "12")
    result = bv.fit(with_optimizer(LONG, learning_rate=0.05), folder, progress=False)
    found = bv.evaluate(bv.restore(folder), result.images).report["test"]
    for name in ("objective", "calibrated_elbo"):
        assert result.report["test"][name].value == pytest.approx(found[name].value, rel=1e-5)
        assert abs(found[name].value - runs[4].report["test"][name].value) > 1.0
    assert read_evaluation(folder).report == result.report


@pytest.mark.long
def test_another_experiment_is_refused_before_anything_is_written(runs, tmp_path):
    folder = shutil.copytree(runs[2].workdir, tmp_path / "run")
    before = files_of(folder)
    for wanted, sentence in (
        (dataclasses.replace(LONG, beta=2.0), "--start-from"),
        (dataclasses.replace(SHORT, epochs=1), "Give --epochs 2 or more"),
        (with_optimizer(SHORT, learning_rate=1e-4), "this would change nothing"),
    ):
        with pytest.raises(UserError, match=sentence):
            bv.fit(wanted, folder, progress=False)
    assert files_of(folder) == before
