"""Sweeps that go on with more epochs, and those that begin with the weights of a run."""

import dataclasses
import shutil

import chex
import pytest

import bsvae_jax as bv
from bsvae_jax.config import MLP, Config, Digits, Optimizer
from bsvae_jax.errors import UserError
from bsvae_jax.objective import Optimal
from bsvae_jax.sweeps.fit_sweep import fit_sweep
from bsvae_jax.sweeps.grid import Sweep
from bsvae_jax.sweeps.info import read_sweep
from bsvae_jax.sweeps.report import status
from bsvae_jax.sweeps.results import read_results
from bsvae_jax.training.workdir import read_info

SHORT = Config(
    data=Digits(validation=None),
    network=MLP((8,)),
    latent_size=2,
    epochs=1,
    batch_size=500,
    devices=1,
    optimizer=Optimizer(schedule="constant"),
)
LONG = dataclasses.replace(SHORT, epochs=3)  # 3 steps an epoch
TWO = Sweep((0.5, 4.0), (Optimal(),), 1)
NAMES = ["optimal_beta0.5_seed0", "optimal_beta4_seed0"]


class Halt(bv.Callback):
    """Ends a call as an interruption does, at the first evaluation of the first member."""

    def on_evaluation(self, run, row):
        raise RuntimeError


def sweep(config, grid, folder, **settings):
    return fit_sweep(config, grid, folder, execution="loop", progress=False, **settings)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished sweep of two members, not to be changed."""
    folder = tmp_path_factory.mktemp("going_on") / "sweep"
    assert sweep(SHORT, TWO, folder).finished == NAMES
    return folder


@pytest.mark.long
def test_a_longer_sweep_is_the_one_that_was_as_long_from_the_beginning(short, tmp_path):
    """Of a constant learning rate, to the bit; interrupted on the way, no old number passes for a new one."""
    folder = shutil.copytree(short, tmp_path / "sweep")
    with pytest.raises(bv.CallbackError):
        sweep(LONG, TWO, folder, callbacks=[Halt()])
    assert read_sweep(folder).config.epochs == 3
    with pytest.raises(UserError, match=r"no finished member yet \(0 diverged, 2 not finished\)"):
        read_results(folder)
    assert sweep(LONG, TWO, folder).finished == NAMES
    for member in TWO.members(LONG):
        alone = bv.fit(member.config, tmp_path / member.name, progress=False)
        own = folder / "members" / member.name
        assert read_info(own).config == member.config
        assert [change[:2] for change in read_info(own).changes] == [(3, ("epochs: 1 -> 3",))]
        chex.assert_trees_all_equal(bv.restore(own).variables, bv.restore(alone.workdir).variables)
    assert len(read_results(folder).members) == 2


@pytest.mark.long
def test_a_member_that_a_callback_stopped_goes_on_with_the_others(tmp_path):
    class Enough(bv.Callback):
        def on_evaluation(self, run, row):
            return "enough" if run.name == NAMES[1] else None

    folder = tmp_path / "sweep"
    two = dataclasses.replace(LONG, epochs=2)
    assert sweep(two, TWO, folder, callbacks=[Enough()]).finished == NAMES
    assert [bv.restore(folder / "members" / name).step for name in NAMES] == [6, 3]
    assert sweep(two, TWO, folder).finished == NAMES
    assert [bv.restore(folder / "members" / name).step for name in NAMES] == [6, 3]
    with pytest.raises(bv.CallbackError):
        sweep(LONG, TWO, folder, callbacks=[Halt()])
    with pytest.raises(UserError, match=r"no finished member yet \(0 diverged, 2 not finished\)"):
        read_results(folder)
    assert sweep(LONG, TWO, folder).finished == NAMES
    assert [bv.restore(folder / "members" / name).step for name in NAMES] == [9, 9]


@pytest.mark.long
def test_how_a_sweep_does_not_go_on(short, tmp_path):
    before = {path: path.read_bytes() for path in short.rglob("*") if path.is_file() and path.name != ".lock"}
    faster = dataclasses.replace(LONG, optimizer=Optimizer(schedule="constant", learning_rate=0.1))
    for config, grid, sentence in (
        (
            LONG,
            dataclasses.replace(TWO, beta=(0.5, 8.0)),
            f"goes on with all its members .epochs: 1 -> 3., and {NAMES[1]} is none",
        ),
        (faster, TWO, "a sweep that goes on may change epochs"),
    ):
        with pytest.raises(UserError, match=sentence):
            sweep(config, grid, short)
    assert before == {path: path.read_bytes() for path in before}
    folder = shutil.copytree(short, tmp_path / "sweep")
    member = TWO.members(LONG)[0]
    bv.fit(member.config, folder / "members" / member.name, progress=False)  # one of its members was trained longer alone
    with pytest.raises(UserError, match=r"optimal_beta0.5_seed0 has trained for 9 steps, so that it cannot end with epoch 1"):
        sweep(SHORT, TWO, folder)
    assert sweep(LONG, TWO, folder).finished == NAMES


@pytest.mark.long
def test_all_members_begin_with_the_weights_of_a_run(short, tmp_path):
    source = shutil.copytree(short / "members" / NAMES[0], tmp_path / "source")
    folder = tmp_path / "sweep"
    assert sweep(SHORT, TWO, folder, start_from=source).finished == NAMES
    for member in TWO.members(SHORT):
        alone = bv.fit(member.config, tmp_path / member.name, progress=False, start_from=source)
        own = folder / "members" / member.name
        chex.assert_trees_all_equal(bv.restore(own).variables, bv.restore(alone.workdir).variables)
        assert read_info(own).started_from == read_info(alone.workdir).started_from
    assert f"all began with the weights of {source} (step 3)" in status(read_results(folder))
    more = dataclasses.replace(TWO, beta=(0.5, 8.0))
    assert sweep(SHORT, more, folder).finished == [NAMES[0], "optimal_beta8_seed0"]  # it need not be said again
    assert read_info(folder / "members" / "optimal_beta8_seed0").started_from["workdir"] == str(source)
    most = dataclasses.replace(TWO, beta=(9.0,))
    bv.fit(dataclasses.replace(read_info(source).config, epochs=2), source, progress=False)
    with pytest.raises(UserError, match=r"source \(step 6\) has other weights than at step 3, when .* began from it"):
        sweep(SHORT, most, folder)
    source.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="source is not a run"):
        sweep(SHORT, most, folder)
    with pytest.raises(UserError, match=r"sweep began from .*source, not from .*gone. Leave out --start-from"):
        sweep(SHORT, TWO, folder, start_from=tmp_path / "gone")
    with pytest.raises(UserError, match="began with weights drawn from its seed, not from"):
        sweep(SHORT, TWO, short, start_from=tmp_path / "gone")
    assert sweep(SHORT, TWO, folder, start_from=source).finished == NAMES  # all have begun, and need it no more
