"""Which checkpoints stay, and that they restore onto any devices."""

import contextlib
import errno
import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bsvae_jax.distributed.mesh import data_mesh, replicate
from bsvae_jax.errors import UserError
from bsvae_jax.training.checkpoints import Checkpoints, DamagedCheckpointError, LostCheckpointError, saved_steps


def _state(value: float):
    return {"weights": jnp.full((3, 2), value), "step": jnp.int32(value), "empty": {}}


@pytest.mark.long
def test_the_latest_two_and_the_best_are_kept(tmp_path):
    objectives = {1: 5.0, 2: -1.0, 3: 4.0, 4: 0.0, 5: 3.0}
    for part in ((1, 2, 3), (4, 5)):  # the best must survive being opened again
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            for step in part:
                checkpoints.save(step, _state(float(step)), objectives[step])
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.best_step() == 2
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        step, state = checkpoints.restore(_state(0.0), step=checkpoints.best_step())
        assert step == 2
        np.testing.assert_array_equal(state["weights"], np.full((3, 2), 2.0))
        assert checkpoints.restore(_state(0.0))[0] == 5


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_checkpoint_of_four_devices_restores_onto_any_number(devices, tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, replicate(_state(7.0), data_mesh(4)), 0.0)
    target = replicate(_state(0.0), data_mesh(devices))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        _, state = checkpoints.restore(target)
    assert len(state["weights"].sharding.device_set) == devices
    np.testing.assert_array_equal(state["weights"], np.full((3, 2), 7.0))
    assert state["step"].dtype == jnp.int32


def test_a_donated_state_can_be_saved_before_the_next_step(tmp_path):
    """Saving is asynchronous: the values must be those at the time of the call."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = replicate(_state(0.0), data_mesh(1))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for number in range(1, 4):
            state = step(state)
            checkpoints.save(number, state, float(-number))
        checkpoints.wait()
        for number in (2, 3):
            _, saved = checkpoints.restore(_state(0.0), step=number)
            np.testing.assert_array_equal(saved["weights"], np.full((3, 2), float(number)))


def test_nothing_saved(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.best_step() is None
        with pytest.raises(UserError, match="There is no checkpoint in"):
            checkpoints.restore(_state(0.0))


def _damage(folder):
    for path in folder.rglob("*"):
        if path.is_file() and "default" in path.parts:
            path.write_bytes(b"damaged")


@pytest.fixture
def damaged(tmp_path):
    """Steps 1 and 2, of which 2 is damaged."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(float(step)), float(-step))
    _damage(tmp_path / "checkpoints" / "2")
    return tmp_path / "checkpoints"


def test_damage_is_reported_and_passed_over(damaged):
    warnings: list[str] = []
    with Checkpoints(damaged) as checkpoints:
        step, state = checkpoints.restore(_state(0.0), warn=warnings.append)
        assert (step, float(state["weights"][0, 0])) == (1, 1.0)
        assert len(warnings) == 1
        assert "checkpoints/2 does not load" in warnings[0]
        assert checkpoints.steps() == [1]
        checkpoints.save(2, _state(20.0), -2.0)  # the step is free again
        checkpoints.wait()
        assert float(checkpoints.restore(_state(0.0), step=2)[1]["weights"][0, 0]) == 20.0
    assert [path.name for path in (damaged.parent / "damaged_checkpoints").iterdir()] == ["2_0"]


@pytest.mark.long
def test_a_damaged_step_asked_for_by_name_is_moved_aside(damaged):
    warnings: list[str] = []
    with Checkpoints(damaged) as checkpoints:
        with pytest.raises(DamagedCheckpointError, match=r"checkpoints/2 does not load .* was moved to .*damaged_checkpoints"):
            checkpoints.restore(_state(0.0), 2, warnings.append)
        assert checkpoints.steps() == [1]
        step, state = checkpoints.restore(_state(0.0), step=1)
        assert (step, float(state["weights"][0, 0])) == (1, 1.0)
    assert not warnings  # the caller is told by the error
    assert [path.name for path in (damaged.parent / "damaged_checkpoints").iterdir()] == ["2_0"]


@pytest.mark.long
def test_reading_moves_nothing(damaged):
    with Checkpoints(damaged, read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"No checkpoint loads: .*checkpoints/2 does not load") as error:
            checkpoints.restore(_state(0.0), step=2)
        assert not isinstance(error.value, DamagedCheckpointError)
        assert checkpoints.restore(_state(0.0))[0] == 1
    assert saved_steps(damaged) == [1, 2]
    assert not (damaged.parent / "damaged_checkpoints").exists()


@pytest.mark.long
def test_nothing_loads(damaged):
    _damage(damaged / "1")
    with Checkpoints(damaged) as checkpoints, pytest.raises(UserError, match=r"No checkpoint loads: .*/2 .*; .*/1 does not"):
        checkpoints.restore(_state(0.0))
    assert saved_steps(damaged) == [1, 2]  # left for the user to look at


@pytest.mark.long
@pytest.mark.parametrize(
    "read_only",
    [True, False],
)
def test_a_step_that_is_not_saved(damaged, read_only):
    with Checkpoints(damaged, read_only=read_only) as checkpoints, pytest.raises(UserError, match="/7 does not load"):
        checkpoints.restore(_state(0.0), step=7)


def test_saved_steps_need_no_folder_and_make_none(tmp_path):
    assert saved_steps(tmp_path / "checkpoints") == []
    assert not (tmp_path / "checkpoints").exists()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (4, 10):
            checkpoints.save(step, _state(1.0), 0.0)
    assert saved_steps(tmp_path / "checkpoints") == [4, 10]


def test_what_a_kill_left_of_a_save_is_no_damaged_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, _state(1.0), 0.0)
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "metrics"
    left.mkdir(parents=True)
    (left / "metrics").write_text('{"objec')
    for read_only in (True, False):
        with Checkpoints(tmp_path / "checkpoints", read_only=read_only) as checkpoints:
            assert checkpoints.restore(_state(0.0))[0] == 1
    assert not (tmp_path / "damaged_checkpoints").exists()


def test_a_step_that_a_run_deletes_while_it_is_read_is_no_damaged_checkpoint(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, _state(1.0), 0.0)
    opened, looks = Checkpoints._open, []

    def beside_a_writer(self):
        looks.append(self)
        if len(looks) < 3:
            raise FileNotFoundError("checkpoints/0/metrics/metrics")
        return opened(self)

    monkeypatch.setattr(Checkpoints, "_open", beside_a_writer)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
    looks.clear()
    with pytest.raises(UserError, match="does not open"):
        Checkpoints(tmp_path / "checkpoints")


@pytest.mark.long
def test_steps_that_a_run_replaces_while_they_are_read_are_looked_for_again(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as writer:
        writer.save(1, _state(1.0), 1.0)
        writer.wait()
        with Checkpoints(tmp_path / "checkpoints", read_only=True) as reader:
            for step in (2, 3, 4):
                writer.save(step, _state(float(step)), 1.0 - step)
            writer.wait()
            assert not (tmp_path / "checkpoints" / "1").exists()
            warnings: list[str] = []
            assert reader.restore(_state(0.0), warn=warnings.append)[0] == 4
            assert not warnings


@pytest.mark.long
@pytest.mark.parametrize("name", ["hidden=[16,16]", "[!a]", "a*b", "a?b", "a b#%20$x"])
def test_any_character_but_a_backslash_may_be_in_the_path(name, tmp_path, monkeypatch):
    """Orbax merges the files it finds by the unescaped path as a pattern, and without a file says nothing."""
    (tmp_path / name / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name)
    folder = Path("run/checkpoints")  # the resolved path is what counts
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(float(step)), float(-step))
    moved = tmp_path / "moved"
    (tmp_path / name / "run").rename(moved)
    for again in (moved / "checkpoints", tmp_path / name / "run" / "checkpoints"):
        with Checkpoints(again, read_only=True) as checkpoints:
            step, state = checkpoints.restore(_state(0.0))
        assert (step, float(state["weights"][2, 1])) == (2, 2.0)
        if again.parent == moved:
            moved.rename(tmp_path / name / "run")


def test_a_path_that_is_not_utf_8_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"caf\\xe9/checkpoints has a name that is not UTF-8, where checkpoints cannot be kept"):
        Checkpoints(tmp_path / "caf\udce9" / "checkpoints")
    assert not list(tmp_path.iterdir())


def test_a_backslash_in_the_path_is_refused(tmp_path):
    folder = tmp_path / "a\\b" / "checkpoints"
    with pytest.raises(
        UserError, match=r"has a backslash in its path \(.*a\\b.*\), where checkpoints cannot be kept; rename it"
    ):
        Checkpoints(folder)
    assert not folder.parent.exists()
    (tmp_path / "a" / "b" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Arrays that were saved there before lie in .*/a/b/checkpoints\."):
        Checkpoints(folder)


def _unmerge(step):
    """As Orbax leaves a step whose path does not match itself as a pattern."""
    (step / "default" / "manifest.ocdbt").unlink()
    shutil.rmtree(step / "default" / "d")


@pytest.mark.long
def test_arrays_that_were_not_merged_are_rescued_by_the_command_in_the_message(tmp_path):
    folder = tmp_path / "it's" / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, _state(1.0), None)
    _unmerge(folder / "1")
    for read_only in (True, False):
        with Checkpoints(folder, read_only) as checkpoints, pytest.raises(UserError, match="were not put together") as error:
            checkpoints.restore(_state(0.0), None if read_only else 1)
    assert saved_steps(folder) == [1]
    subprocess.run(re.search(r"to do it: (mv .*)\)\. It", str(error.value))[1], shell=True, check=True)
    with Checkpoints(folder) as checkpoints:
        assert float(checkpoints.restore(_state(0.0))[1]["weights"][0, 0]) == 1.0


@pytest.mark.long
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_unmerge, r"checkpoints/1 was saved and does not load again .*were not put together; to do it: mv .*default/ocdbt"),
        (lambda step: shutil.rmtree(step / "default"), r"was saved and does not load again \(.*Choose another --workdir"),
    ],
)
def test_the_first_checkpoint_is_read_back(spoil, message, tmp_path, monkeypatch):
    wait = ocp.CheckpointManager.wait_until_finished

    def wait_and_spoil(self):
        wait(self)
        if (tmp_path / "checkpoints" / "1").is_dir():
            spoil(tmp_path / "checkpoints" / "1")

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "wait_until_finished", wait_and_spoil)
            with pytest.raises(LostCheckpointError, match=message):
                checkpoints.save(1, _state(1.0), None)
        checkpoints.wait()


@contextlib.contextmanager
def _forbidden(path):
    """A file that may not be read, also for a superuser, who is somebody else meanwhile."""
    pytest.importorskip("grp")  # loaded by etils when something is wrong, and nobody may read Python's own folder
    superuser = os.geteuid() == 0
    path.chmod(0)
    try:
        if superuser:
            os.seteuid(65534)
        yield
    finally:
        if superuser:
            os.seteuid(0)
        path.chmod(0o777)


@pytest.mark.long
@pytest.mark.parametrize(
    "file", ["default/manifest.ocdbt", "default/d", "default/_METADATA", "_CHECKPOINT_METADATA", "metrics/metrics", "."]
)
def test_what_may_not_be_read_is_not_damaged(file):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name) / "checkpoints"
        with Checkpoints(folder) as checkpoints:
            for step in (1, 2):
                checkpoints.save(step, _state(float(step)), float(-step))
        for path in (Path(name), *Path(name).rglob("*")):
            path.chmod(0o777)
        for read_only in (True, False):
            with (
                _forbidden(folder / "2" / file),
                pytest.raises(UserError, match=r"cannot be read \(Permission denied\).*nothing was changed"),
                Checkpoints(folder, read_only) as checkpoints,
            ):
                checkpoints.restore(_state(0.0))
        assert [path.name for path in Path(name).iterdir()] == ["checkpoints"]
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.restore(_state(0.0))[0] == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), "the system says Input/output error"),
        (OSError(errno.EMFILE, "Too many open files"), "the system says Too many open files"),
        (MemoryError(), "there is too little memory"),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory"), "there is too little memory"),
    ],
)
def test_what_the_system_does_not_give_is_not_damaged(error, message, tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, _state(1.0), None)
        checkpoints.save(2, _state(2.0), None)
        checkpoints.wait()

        def refuse(*arguments, **options):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "restore", refuse)
            for step in (None, 2):
                with pytest.raises(UserError, match=rf"/2 does not load \({message}.*nothing was changed"):
                    checkpoints.restore(_state(0.0), step)
        assert checkpoints.restore(_state(0.0))[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": jnp.zeros(4, jnp.int32)}, r"its step is int32 of shape \(\), and int32 of shape \(4,\) is expected"),
        ({"step": jnp.float32(0.0)}, r"its step is int32 of shape \(\), and float32 of shape \(\) is expected"),
        ({"more": jnp.int32(0)}, "not in both: more"),
    ],
)
def test_another_state_is_not_damaged(change, message, tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, _state(1.0), None)
        for step in (None, 1):
            with pytest.raises(UserError, match=message):
                checkpoints.restore(_state(0.0) | change, step)
        assert checkpoints.restore(_state(0.0))[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_others_are_heard_through_absl(tmp_path, caplog):
    log = logging.getLogger("absl")
    before = log.level, list(log.filters)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with caplog.at_level(logging.INFO):
            checkpoints.save(1, _state(1.0), None)
            checkpoints.wait()
            log.warning("the host's")
        assert [record.message for record in caplog.records if record.name == "absl"] == ["the host's"]
    assert (log.level, log.filters) == before
