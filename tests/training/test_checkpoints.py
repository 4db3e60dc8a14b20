"""Which checkpoints stay, and that they restore onto any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsvae_jax.distributed.mesh import data_mesh, replicate
from bsvae_jax.errors import UserError
from bsvae_jax.training.checkpoints import Checkpoints, DamagedCheckpointError, saved_steps


def _state(value: float):
    return {"weights": jnp.full((3, 2), value), "step": jnp.int32(value), "empty": {}}


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


def test_reading_moves_nothing(damaged):
    with Checkpoints(damaged, read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"No checkpoint loads: .*checkpoints/2 does not load") as error:
            checkpoints.restore(_state(0.0), step=2)
        assert not isinstance(error.value, DamagedCheckpointError)
        assert checkpoints.restore(_state(0.0))[0] == 1
    assert saved_steps(damaged) == [1, 2]
    assert not (damaged.parent / "damaged_checkpoints").exists()


def test_nothing_loads(damaged):
    _damage(damaged / "1")
    with Checkpoints(damaged) as checkpoints, pytest.raises(UserError, match=r"No checkpoint loads: .*/2 .*; .*/1 does not"):
        checkpoints.restore(_state(0.0))
    assert saved_steps(damaged) == [1, 2]  # left for the user to look at


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
