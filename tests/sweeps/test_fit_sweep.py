"""Sweeps end to end: every member is the run that `fit` would have made of it, whatever it was trained beside.

The independent side is a single run (`fit`, no stack, one device) or NumPy; a sweep is never compared with what it stored
itself, except where it must not change.
"""

import dataclasses
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import MLP, Arrays, Augmentation, Config, Digits, Linear, Optimizer, Residual
from bsvae_jax.data import load
from bsvae_jax.distributed.mesh import member_slots, stack, sweep_mesh
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation import scores
from bsvae_jax.objective import Constant, Learned, Optimal, Predicted
from bsvae_jax.sweeps import fit_sweep as sweeps
from bsvae_jax.sweeps import gallery
from bsvae_jax.sweeps.fit_sweep import choose_execution, fit_sweep
from bsvae_jax.sweeps.grid import Sweep
from bsvae_jax.sweeps.info import read_sweep
from bsvae_jax.training import program, workdir
from bsvae_jax.training import state as building
from bsvae_jax.training.checkpoints import saved_steps
from bsvae_jax.training.fit import fit
from bsvae_jax.training.program import Program
from bsvae_jax.training.restore import restore
from bsvae_jax.training.trainer import Trainer
from bsvae_jax.training.workdir import RunDirectory

# 3 epochs of 3 steps; the last batch of an epoch straddles nothing, so every epoch ends a window early.
BASE = Config(
    data=Digits(validation=None),
    network=MLP((16,)),
    latent_size=4,
    epochs=3,
    batch_size=500,
    devices=1,
    augmentation=Augmentation(flip=True),
    optimizer=Optimizer(ema_decay=0.9),
)
THREE = Sweep(beta=(0.5, 1.0, 4.0), decoder_variance=(Optimal(),), seeds=1)
NAMES = ["optimal_beta0.5_seed0", "optimal_beta1_seed0", "optimal_beta4_seed0"]


def run_sweep(config, grid, folder, **settings):
    return fit_sweep(config, grid, folder, progress=False, **settings)


def rows(folder):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(folder)]


def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


def contents(folder):
    """Bytes and time of change of every file, but for the lock, which every look takes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def check_same(folder, expected, exact=True, rate=1e-3):
    """The run in `folder` has the numbers of the run in `expected`: metrics, evaluation, parameters."""
    ours, theirs = restore(folder), restore(expected)
    assert (ours.config, ours.step) == (theirs.config, theirs.step)
    check_numbers(folder, expected, exact, rate)


def check_numbers(folder, expected, exact, rate=1e-3, biases=True, rel=1e-4):
    """The same, of configs that may differ in what must not matter."""
    ours, theirs = restore(folder), restore(expected)
    assert ours.step == theirs.step
    if exact:
        chex.assert_trees_all_equal(ours.variables, theirs.variables)
        # The parameters are the same to the bit; sums over 512 images may be taken in another order, in a scan as outside
        # (seen with JAX 0.12: the last place of float32).
        compare_reports(folder, expected, rel=1e-6)
        return
    # Sums in another order. Adam divides a gradient by its own size, so that one near 0 may turn an update around; a tenth
    # of one step's learning rate is far above what rounding has been seen to do in nine steps (1e-6), and far below a step.
    for (path, one), (_, other) in zip(*(jax.tree.leaves_with_path(run.variables) for run in (ours, theirs)), strict=True):
        if biases or "bias" not in str(path[-1]):  # before batch normalization a bias has rounding for a gradient, no more
            np.testing.assert_allclose(one, other, atol=0.1 * rate, rtol=1e-5, err_msg=str(path))
    compare_reports(folder, expected, rel)


def compare_reports(folder, expected, rel):
    for split, quantities in evaluation(expected)["splits"].items():
        for name, quantity in quantities.items():
            value = evaluation(folder)["splits"][split][name]["value"]
            assert value == pytest.approx(quantity["value"], rel=rel), (split, name)
    for one, other in zip(rows(folder), rows(expected), strict=True):
        assert one.pop("split") == other.pop("split")
        assert one == pytest.approx(other, rel=rel)


@pytest.fixture(autouse=True)
def unmeasured(request, monkeypatch):
    """Memory is measured by compiling; most tests have enough of it. Those that ask for `measured` see the real thing."""
    if "measured" not in request.fixturenames:
        monkeypatch.setattr(Program, "needed_bytes", lambda self, members: 1)


@pytest.fixture
def measured():
    pass


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """`alone(config)`: the folder of a single run of that config on one device, made once."""
    folders = {}

    def run(config):
        if config not in folders:
            folders[config] = tmp_path_factory.mktemp("alone") / "run"
            fit(config, folders[config], progress=False)
        return folders[config]

    return run


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A finished sweep of three members, not to be changed."""
    folder = tmp_path_factory.mktemp("three") / "sweep"
    result = run_sweep(BASE, THREE, folder)
    assert (result.folder, result.finished, result.failed) == (folder, NAMES, {})
    return folder


@pytest.fixture
def trained(monkeypatch):
    """Names of the members of every turn that is trained, in order."""
    turns = []
    train = Trainer.train

    def noted(self, at=None):
        turns.append([member.run.folder.name for member in self.members])
        return train(self, at)

    monkeypatch.setattr(Trainer, "train", noted)
    return turns


# --- A member is a run ------------------------------------------------------------------------------------------------

LINEAR = dataclasses.replace(BASE, network=Linear())  # compiled in less time
CONSTANTS = Sweep((0.5, 4.0), (Constant(0.1), Constant(0.4)), 1)
RATES = Sweep((4.0,), (Optimal(), Learned()), 1, learning_rate=(1e-3, 1e-2, 3e-3))


@pytest.mark.long
@pytest.mark.parametrize(
    ("grid", "stacks", "execution"),
    [
        (CONSTANTS, [4], "loop"),
        (CONSTANTS, [4], "vmap"),
        pytest.param(RATES, [3, 3], "scan", marks=pytest.mark.slow),
        pytest.param(RATES, [3, 3], "vmap", marks=pytest.mark.slow),
        pytest.param(CONSTANTS, [4], "scan", marks=pytest.mark.slow),
        pytest.param(RATES, [3, 3], "loop", marks=pytest.mark.slow),
    ],
)
def test_every_member_is_the_run_of_its_config_alone(execution, grid, stacks, alone, trained, tmp_path):
    """Betas and constant variances in one stack, learning rates in another, which differ from stack to stack in their kind."""
    result = run_sweep(LINEAR, grid, tmp_path / "sweep", execution=execution)
    members = grid.members(LINEAR)
    assert result.finished == [member.name for member in members]
    assert [len(turn) for turn in trained] == ([1] * len(members) if execution == "loop" else stacks)
    for member in members:
        rate = member.config.optimizer.learning_rate
        # scan does, for each member, the very operations of a single run; vmap batches the matrix products of all.
        check_same(tmp_path / "sweep" / "members" / member.name, alone(member.config), execution != "vmap", rate)
        if isinstance(member.config.decoder_variance, Constant):  # D/2 log(2 pi v) + SSE / (2 v) of 64 pixels
            variance = member.config.decoder_variance.variance
            values = evaluation(tmp_path / "sweep" / "members" / member.name)["splits"]["test"]
            assert values["variance"]["value"] == variance
            expected = 32 * np.log(2 * np.pi * variance) + 64 * values["mse"]["value"] / (2 * variance)
            assert values["distortion"]["value"] == pytest.approx(expected, rel=1e-9)
    numbers = [evaluation(tmp_path / "sweep" / "members" / m.name)["splits"]["test"]["rate"]["value"] for m in members]
    assert len(set(numbers)) == len(numbers)  # no two members are the same run


THREE_FIVE_EIGHT = ((0.5, 1.0, 4.0), 1), ((0.5, 1.0, 2.0, 4.0, 8.0), 1), ((0.5, 4.0), 4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("execution", "betas_and_seeds", "variance", "network", "window"),
    [
        ("scan", THREE_FIVE_EIGHT[0], Optimal("batch"), Linear(), None),
        ("vmap", THREE_FIVE_EIGHT[1], Optimal("batch"), Linear(), 2),
        pytest.param("scan", THREE_FIVE_EIGHT[2], Optimal("batch"), Linear(), 1, marks=pytest.mark.slow),
        *(
            pytest.param(execution, betas_and_seeds, variance, MLP((16,)), window, marks=pytest.mark.slow)
            for execution in ("scan", "vmap")
            for betas_and_seeds in THREE_FIVE_EIGHT
            for variance in (Optimal("batch"), Constant(0.1), Learned())
            for window in (None, 1, 2)
        ),
    ],
)
def test_devices_do_not_change_a_member(execution, betas_and_seeds, variance, network, window, alone, tmp_path):
    """3, 5 and 8 members over 8 devices, against one model on one: slots left over, a shared batch, short windows."""
    betas, seeds = betas_and_seeds
    grid = Sweep(betas, (variance,), seeds)
    config = dataclasses.replace(BASE, network=network, devices=8, batch_size=504, steps_per_dispatch=window)
    run_sweep(config, grid, tmp_path / "sweep", execution=execution)
    members = grid.members(config)
    for member in (members[0], members[-1]):
        single = alone(dataclasses.replace(member.config, devices=1, steps_per_dispatch=None))
        check_numbers(tmp_path / "sweep" / "members" / member.name, single, exact=False)


@pytest.mark.long
def test_a_member_on_a_device_of_its_own_is_the_same_to_the_bit(three, tmp_path):
    """As `bsvae sweep` has it on CPUs: three of these eight devices, which share no batch."""
    config = dataclasses.replace(BASE, devices=None)
    run_sweep(config, THREE, tmp_path / "sweep", execution="scan")
    for name in NAMES:
        check_numbers(tmp_path / "sweep" / "members" / name, three / "members" / name, exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["scan", "vmap"])
def test_a_stack_with_batch_norm(execution, alone, tmp_path):
    """One step a call, as convolutions are dispatched here, and running statistics that are each member's own."""
    config = dataclasses.replace(BASE, network=Residual((2,)), epochs=1)
    grid = Sweep((0.5, 4.0), (Optimal(),), 1)
    run_sweep(config, grid, tmp_path / "sweep", execution=execution)
    for member in grid.members(config):
        folder, single = tmp_path / "sweep" / "members" / member.name, alone(member.config)
        # Those biases are in the running means, of which three steps are but a few; ELBOs are differences of larger numbers.
        check_numbers(folder, single, exact=False, rate=1e-3, biases=False, rel=5e-3)
        assert restore(folder).variables["batch_stats"]


def test_how_members_are_driven_is_chosen_by_what_was_measured():
    residual = dataclasses.replace(BASE, network=Residual((4,)))
    linear = dataclasses.replace(BASE, network=Linear())
    assert [choose_execution(config, "cpu") for config in (BASE, linear, residual)] == ["scan", "scan", "loop"]
    assert [choose_execution(config, platform) for config in (BASE, residual) for platform in ("gpu", "tpu")] == ["vmap"] * 4


@pytest.mark.parametrize(
    ("batch_size", "pixels", "precision", "platform", "expected"),
    [
        (512, 28 * 28, "float32", "gpu", "scan"),
        (512, 28 * 28, "tensorfloat32", "gpu", "scan"),
        (128, 64 * 64, "float32", "gpu", "scan"),
        (128, 28 * 28, "float32", "gpu", "vmap"),
        (512, 28 * 28, "bfloat16", "gpu", "vmap"),
        (512, 28 * 28, "float32", "tpu", "vmap"),
    ],
)
def test_members_that_fill_a_gpu_alone_follow_one_another(batch_size, pixels, precision, platform, expected):
    config = dataclasses.replace(BASE, network=Residual((4,)), batch_size=batch_size, precision=precision)
    assert choose_execution(config, platform, pixels) == expected
    assert choose_execution(dataclasses.replace(config, network=Linear()), platform, pixels) == "vmap"


@pytest.mark.long
def test_that_choice_is_taken_unless_another_is_made(three, trained, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(sweeps, "choose_execution", lambda *arguments: asked.append(arguments) or "loop")
    run_sweep(BASE, THREE, tmp_path / "sweep")
    assert asked == [(BASE, "cpu"), (BASE, "cpu", 64)]  # before the data are read, and after
    assert trained == [[name] for name in NAMES]
    for name in NAMES:
        check_same(tmp_path / "sweep" / "members" / name, three / "members" / name)


@pytest.mark.long
def test_what_differs_by_its_value_compiles_nothing(measured, monkeypatch, trained, tmp_path):
    counts = {}

    def counted(module, name):
        function = getattr(module, name)

        def traced(*arguments, **settings):
            counts[name] = counts.get(name, 0) + 1
            return function(*arguments, **settings)

        monkeypatch.setattr(module, name, traced)

    counted(program, "run_steps")
    counted(scores, "_score_batch")
    counted(gallery, "_draw")
    for cached in (scores, gallery):
        cached._parallelized.cache_clear()
    # 2 * 2 * 2 * 2 members, at most 5 at a time, spread over 4 turns of 4.
    grid = Sweep((0.5, 4.0), (Constant(0.1), Constant(0.4)), 2, learning_rate=(1e-3, 1e-2))
    config = dataclasses.replace(BASE, evaluate_every=3)
    result = run_sweep(config, grid, tmp_path / "sweep", execution="scan", members_at_once=5)
    assert len(result.finished) == 16
    assert [len(turn) for turn in trained] == [4] * 4
    assert counts["run_steps"] <= 2  # to train, and before that to know the memory
    assert counts["_score_batch"] == 2  # two sizes of split
    assert counts["_draw"] == 1
    for cached in (scores, gallery):
        cached._parallelized.cache_clear()


def test_initial_parameters_compile_nothing_per_member(monkeypatch):
    traces = []
    inner = building._initial_arrays.__wrapped__
    monkeypatch.setattr(
        building, "_initial_arrays", jax.jit(lambda *a: (traces.append(1), inner(*a))[1], static_argnums=(0, 1))
    )
    model = building.build_model(BASE, (8, 8, 1), 1 / 16)
    states = [building.create_state(member.config, model, 9) for member in RATES.members(BASE)]
    assert len(traces) == 1
    assert {float(state.learning_rate) for state in states} == {float(np.float32(rate)) for rate in (1e-3, 1e-2, 3e-3)}
    # Nor for a variance without parameters, which the start does not know of; for another, whose parameters it makes.
    for variance, programs in ((Optimal("batch"), 1), (Constant(0.1), 1), (Learned(), 2), (Predicted(), 3)):
        model = building.build_model(dataclasses.replace(BASE, decoder_variance=variance), (8, 8, 1), 1 / 16)
        state = building.create_state(BASE, model, 9)
        assert len(traces) == programs, variance
        assert state.model.decoder_variance == model.decoder_variance
        assert ("log_variance" in state.params) == isinstance(variance, Learned)
        start = model.init(jax.random.split(jax.random.key(BASE.seed))[0], jnp.zeros((1, 8, 8, 1)), jax.random.key(0))
        chex.assert_trees_all_equal(state.params, start["params"])


# --- What a sweep leaves ----------------------------------------------------------------------------------------------


def test_a_sweep_leaves_its_record(three):
    info = read_sweep(three)
    assert info.config == BASE
    assert info.members == NAMES
    assert (info.data_name, info.image_shape, info.levels) == ("digits", (8, 8, 1), 17)
    images = load(Digits(validation=None))
    assert info.fingerprint == images.fingerprint()
    x = images.train.reshape(1500, 64).astype(np.float64) / 16
    spectrum = np.linalg.eigvalsh(np.cov(x, rowvar=False, bias=True))[::-1]
    np.testing.assert_allclose(info.eigenvalues, spectrum, rtol=1e-4, atol=1e-7)
    assert sorted(path.name for path in (three / "members").iterdir()) == NAMES
    assert sorted(path.name for path in three.iterdir()) == [".lock", "members", "sweep.json"]


def test_pictures(three):
    test = load(Digits(validation=None)).test
    for name in NAMES:
        folder = three / "members" / name
        with np.load(folder / "pictures.npz", allow_pickle=False) as file:
            pictures = dict(file)
        assert set(pictures) == {"originals", "reconstructions", "samples", "latent_rate", "run"}
        for kind in ("originals", "reconstructions", "samples"):
            assert (pictures[kind].shape, pictures[kind].dtype) == ((10, 8, 8, 1), np.uint8), kind
            assert len({image.tobytes() for image in pictures[kind]}) == 10, kind
        np.testing.assert_array_equal(pictures["originals"], np.round(test[:10] * (255 / 16)).astype(np.uint8))
        run = restore(folder)
        mean, log_variance = run.model.apply(run.variables, jnp.asarray(test, jnp.float32) / 16, jax.random.key(5)).posterior
        # KL(N(m, v) || N(0, 1)) of every latent, from its definition in float64.
        mean, log_variance = np.asarray(mean, np.float64), np.asarray(log_variance, np.float64)
        rate = 0.5 * (mean**2 + np.exp(log_variance) - log_variance - 1).mean(axis=0)
        assert pictures["latent_rate"].shape == (4,)
        np.testing.assert_allclose(pictures["latent_rate"], rate, rtol=1e-4)
        assert pictures["latent_rate"].sum() == pytest.approx(evaluation(folder)["splits"]["test"]["rate"]["value"], rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("execution", ["scan", "vmap"])
def test_galleries_are_what_each_member_draws(execution):
    """Posteriors without noise and decoders that tell: reconstructions are known, samples have the law of the prior."""
    model = building.build_model(dataclasses.replace(BASE, network=MLP((4,)), latent_size=1), (8, 8, 1), 1 / 16)
    examples = load(Digits(validation=None)).examples("test", count=10)
    mesh = sweep_mesh(1, 3, 8)
    members = []
    for offset in (0.1, 0.2, 0.3):
        variables = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), jax.random.key(0))
        params = jax.tree.map(jnp.zeros_like, variables["params"])
        # Posterior N(-1, exp(-40)); the decoder's hidden layer is silu(20 z + 5), its mean is that / 1000 + offset.
        params["encoder"]["posterior"]["bias"] = jnp.array([-1.0, -40.0])
        params["decoder"]["Dense_0"]["kernel"] = jnp.full((1, 4), 20.0)
        params["decoder"]["Dense_0"]["bias"] = jnp.full((4,), 5.0)
        params["decoder"]["mean"]["kernel"] = jnp.full((4, 64), 0.25e-3)
        params["decoder"]["mean"]["bias"] = jnp.full((64,), offset)
        members.append({"params": params})
    keys = [jax.random.key(seed) for seed in (1, 2, 2)]
    drawn = list(
        gallery.draw_members(model, stack(members, mesh), examples, stack(keys, mesh), 3, mesh=mesh, execution=execution)
    )
    assert len(drawn) == 3
    decoded = lambda z: (20 * z + 5) / (1 + np.exp(-20 * z - 5)) / 1000  # noqa: E731
    z = []
    for offset, own in zip((0.1, 0.2, 0.3), drawn, strict=True):
        np.testing.assert_allclose(own.originals, examples.images / 16, atol=1e-6)
        np.testing.assert_allclose(own.reconstructions, np.full((10, 8, 8, 1), offset + decoded(-1.0)), atol=1e-6)
        assert np.ptp(own.samples, axis=(1, 2, 3)).max() < 1e-6
        z.append(own.samples[:, 0, 0, 0] - offset)
        assert (z[-1] > -3e-4).all()  # the least of silu
        assert (z[-1] < decoded(5.0)).all()
        assert np.ptp(z[-1]) > 0.01  # half of all z are positive, and seen
    np.testing.assert_allclose(z[1], z[2], atol=1e-6)  # one key
    assert np.abs(z[0] - z[1]).max() > 1e-3


def test_finished_members_are_not_trained_again(three, trained):
    before = contents(three)
    assert run_sweep(BASE, THREE, three).finished == NAMES
    assert run_sweep(BASE, THREE, three, execution="vmap", members_at_once=2).finished == NAMES
    assert trained == []
    assert contents(three) == before


@pytest.mark.long
def test_a_larger_grid_trains_only_what_is_new(three, alone, trained, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(three, folder)
    before = contents(folder / "members")
    grid = Sweep((8.0, 1.0), (Optimal(),), 2)
    result = run_sweep(BASE, grid, folder)
    new = ["optimal_beta8_seed0", "optimal_beta8_seed1", "optimal_beta1_seed1"]
    assert result.finished == [*new[:2], NAMES[1], new[2]]  # of the other members this grid says nothing
    assert trained == [new]
    assert read_sweep(folder).members == NAMES + new
    after = contents(folder / "members")
    assert {path: after[path] for path in before} == before
    for member in grid.members(BASE)[1::2]:
        check_same(folder / "members" / member.name, alone(member.config))
    # A smaller grid forgets none.
    assert run_sweep(BASE, Sweep((1.0,), (Optimal(),), 1), folder).finished == [NAMES[1]]
    assert read_sweep(folder).members == NAMES + new


# --- Interruption -----------------------------------------------------------------------------------------------------


def interrupted(monkeypatch, folder, saves, **settings):
    """A sweep of `THREE` that is interrupted when its checkpoint number `saves + 1` is about to be saved."""
    save, count = RunDirectory.save, 0

    def stop(self, *arguments):
        nonlocal count
        if count == saves:
            raise KeyboardInterrupt
        count += 1
        return save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(BASE, THREE, folder, **settings)
    return {name: saved_steps(folder / "members" / name / "checkpoints") for name in NAMES}


@pytest.mark.long
@pytest.mark.parametrize(
    ("saves", "steps", "turns"),
    [
        (0, [[], [], []], [NAMES]),
        (2, [[3], [3], []], [NAMES[:2], NAMES[2:]]),  # the last one has nothing yet
        (4, [[3, 6], [3], [3]], [NAMES]),  # the first is a checkpoint ahead
        (8, [[6, 9], [6, 9], [3, 6]], [NAMES]),  # two are at the end, but not evaluated
    ],
)
def test_an_interrupted_stack_ends_as_if_it_had_not_been(saves, steps, turns, three, trained, monkeypatch, tmp_path):
    left = interrupted(monkeypatch, tmp_path / "sweep", saves)
    best_aside = {name: left[name][-2:] for name in NAMES}
    assert list(best_aside.values()) == steps
    trained.clear()
    assert run_sweep(BASE, THREE, tmp_path / "sweep").finished == NAMES
    assert trained == turns
    for name in NAMES:
        check_same(tmp_path / "sweep" / "members" / name, three / "members" / name)


@pytest.mark.long
def test_a_kill_between_two_evaluations_trains_nothing_again(three, trained, monkeypatch, tmp_path):
    write, count = workdir.write_evaluation, 0

    def stop(*arguments, **options):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(workdir, "write_evaluation", stop)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(BASE, THREE, tmp_path / "sweep")
    first = contents(tmp_path / "sweep" / "members" / NAMES[0])
    steps = []
    take = Program.take_steps
    monkeypatch.setattr(Program, "take_steps", lambda self, *arguments: (steps.append(1), take(self, *arguments))[1])
    assert run_sweep(BASE, THREE, tmp_path / "sweep").finished == NAMES
    assert trained[1:] == [NAMES[1:]]
    assert not steps
    assert contents(tmp_path / "sweep" / "members" / NAMES[0]) == first
    for name in NAMES:
        check_same(tmp_path / "sweep" / "members" / name, three / "members" / name)


@pytest.mark.long
@pytest.mark.parametrize(("execution", "at_once"), [("loop", None), ("vmap", 3)])
def test_another_way_of_computing_continues(execution, at_once, three, monkeypatch, tmp_path):
    interrupted(monkeypatch, tmp_path / "sweep", 4)
    assert run_sweep(BASE, THREE, tmp_path / "sweep", execution=execution, members_at_once=at_once).finished == NAMES
    for name in NAMES:
        check_same(tmp_path / "sweep" / "members" / name, three / "members" / name, exact=execution != "vmap")


@pytest.mark.long
def test_a_member_may_be_continued_alone(three, trained, monkeypatch, tmp_path):
    """By `fit`, which draws no pictures: the sweep adds them and leaves the rest."""
    interrupted(monkeypatch, tmp_path / "sweep", 4)
    folder = tmp_path / "sweep" / "members" / NAMES[1]
    fit(THREE.members(BASE)[1].config, folder, progress=False)
    check_same(folder, three / "members" / NAMES[1])
    assert run_sweep(BASE, THREE, tmp_path / "sweep").finished == NAMES
    for name in NAMES:
        check_same(tmp_path / "sweep" / "members" / name, three / "members" / name)
        pictures = [np.load(root / "members" / name / "pictures.npz") for root in (tmp_path / "sweep", three)]
        for kind in ("originals", "reconstructions", "samples"):
            np.testing.assert_array_equal(pictures[0][kind], pictures[1][kind])
        np.testing.assert_allclose(pictures[0]["latent_rate"], pictures[1]["latent_rate"], rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("damaged", [[NAMES[1]], NAMES], ids=["one member", "all members"])
def test_a_damaged_checkpoint_of_a_stack_is_reported_and_an_earlier_one_used(damaged, three, monkeypatch, tmp_path, caplog):
    left = interrupted(monkeypatch, tmp_path / "sweep", 6)
    assert list(left.values()) == [[3, 6]] * 3
    for name in damaged:
        for path in (tmp_path / "sweep" / "members" / name / "checkpoints" / "6").rglob("*"):
            if path.is_file() and "default" in path.parts:
                path.write_bytes(b"damaged")
    assert run_sweep(BASE, THREE, tmp_path / "sweep").finished == NAMES
    errors = caplog.text
    told = re.findall(r"\S*/members/(\S+)/checkpoints/6 does not load .* moved to", errors)
    assert told == damaged[:1]  # from then on, no member is continued from there
    for name in NAMES:
        assert (tmp_path / "sweep" / "members" / name / "damaged_checkpoints").is_dir() == (name in told)
        check_same(tmp_path / "sweep" / "members" / name, three / "members" / name)
        assert 9 in saved_steps(tmp_path / "sweep" / "members" / name / "checkpoints")


@pytest.mark.long
def test_a_member_whose_checkpoints_are_all_damaged_begins_again(three, trained, monkeypatch, tmp_path):
    interrupted(monkeypatch, tmp_path / "sweep", 3)
    for path in (tmp_path / "sweep" / "members" / NAMES[1] / "checkpoints" / "3").rglob("*"):
        if path.is_file() and "default" in path.parts:
            path.write_bytes(b"")
    assert run_sweep(BASE, THREE, tmp_path / "sweep").finished == NAMES
    assert trained[-2:] == [[NAMES[0], NAMES[2]], [NAMES[1]]]
    for name in NAMES:
        check_same(tmp_path / "sweep" / "members" / name, three / "members" / name)


KILLED = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
sys.path.insert(0, sys.argv[2])
from test_fit_sweep import BASE, THREE, run_sweep
run_sweep(BASE, THREE, sys.argv[1])
"""


@pytest.mark.long
def test_a_killed_sweep_ends_as_if_it_had_not_been(three, tmp_path):
    folder = tmp_path / "sweep"
    cache = jax.config.jax_compilation_cache_dir
    command = [sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parent), cache]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("members/*/metrics.jsonl")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.SystemRandom().uniform(0, 1.5))  # anywhere from the first row to after the end
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert run_sweep(BASE, THREE, folder).finished == NAMES  # the lock went with its holder
    for name in NAMES:
        check_same(folder / "members" / name, three / "members" / name)


# --- Divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("execution", ["scan", "vmap"])
def test_a_member_that_diverges_leaves_the_others_alone(execution, alone, trained, tmp_path, caplog):
    grid = Sweep((0.5,), (Optimal(),), 1, learning_rate=(1e-3, 1e30, 1e-2))
    folder = tmp_path / "sweep"
    result = run_sweep(BASE, grid, folder, execution=execution)
    first, lost, last = grid.members(BASE)
    assert lost.name == "optimal_rate1e+30_beta0.5_seed0"
    assert result.finished == [first.name, last.name]
    assert list(result.failed) == [lost.name]
    failure = json.loads((folder / "members" / lost.name / "failure.json").read_text())
    assert result.failed[lost.name] == failure["error"]
    # The first step is taken with good numbers and leaves parameters of 1e30.
    assert failure["step"] == 2
    assert re.match(
        r"Step 2 is not finite: objective \S+, distortion .*No checkpoint was saved yet\. A lower", failure["error"]
    )
    assert not (folder / "members" / lost.name / "evaluation.json").exists()
    assert saved_steps(folder / "members" / lost.name / "checkpoints") == []
    assert re.search(rf"{re.escape(lost.name)} diverged .* Step 2 is not finite", caplog.text)
    for member in (first, last):
        rate = member.config.optimizer.learning_rate
        check_same(folder / "members" / member.name, alone(member.config), execution == "scan", rate)
    if execution == "scan":  # nor does it matter that there were three
        run_sweep(BASE, dataclasses.replace(grid, learning_rate=(1e-3, 1e-2)), tmp_path / "without", execution=execution)
        for member in (first, last):
            check_same(folder / "members" / member.name, tmp_path / "without" / "members" / member.name)
    # It is known to diverge: not tried again, and still told.
    before = contents(folder)
    trained.clear()
    again = run_sweep(BASE, grid, folder, execution=execution)
    assert again == result
    assert trained == []
    assert contents(folder) == before


@pytest.mark.long
def test_a_member_that_diverges_late_keeps_its_checkpoint(monkeypatch, three, tmp_path):
    """A loss of NaN from the seventh step on, in one member of three."""
    check = Trainer._check_finite

    def poison(self, member, values, start):
        if self.members[member].run.folder.name == NAMES[1] and start >= 6:
            values = np.where(np.arange(values.shape[1]) >= 1, np.nan, values)
        check(self, member, values, start)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_check_finite", poison)
        result = run_sweep(BASE, THREE, tmp_path / "sweep")
    assert result.finished == [NAMES[0], NAMES[2]]
    assert re.match(r"Step 8 is not finite: .*The last good checkpoint is \S+/checkpoints/6\.", result.failed[NAMES[1]])
    folder = tmp_path / "sweep" / "members"
    assert restore(folder / NAMES[1]).step == 6
    assert max(row["step"] for row in read_metrics(folder / NAMES[1])) == 6
    for name in result.finished:
        check_same(folder / name, three / "members" / name)
    # Continued alone, without what poisoned it, it ends like any other, and the sweep takes it back.
    fit(THREE.members(BASE)[1].config, folder / NAMES[1], progress=False)
    result = run_sweep(BASE, THREE, tmp_path / "sweep")
    assert (result.finished, result.failed) == (NAMES, {})
    check_same(folder / NAMES[1], three / "members" / NAMES[1])


@pytest.mark.long
def test_every_member_diverges(tmp_path):
    result = run_sweep(BASE, Sweep((0.5, 1.0), (Optimal(),), 1, learning_rate=(1e30,)), tmp_path / "sweep")
    assert result.finished == []
    assert list(result.failed) == ["optimal_rate1e+30_beta0.5_seed0", "optimal_rate1e+30_beta1_seed0"]
    assert all("Step 2 is not finite" in error for error in result.failed.values())


# --- Memory and turns -------------------------------------------------------------------------------------------------


def needed(config, members):
    """Bytes of a stack on a device, images included, as the compiler counts them."""
    mesh = sweep_mesh(config.devices, members, config.batch_size)
    return Program(config, load(config.data), mesh, "scan").needed_bytes(members)


@pytest.mark.long
def test_the_memory_of_a_stack_is_what_it_holds(measured):
    images = 1500 * 64 + 297 * 64  # uint8
    each = needed(BASE, 4) - needed(BASE, 3)
    state = building.create_state(BASE, building.build_model(BASE, (8, 8, 1)), 9)
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    # Parameters, their average and two moments, the indices of a window of 50 steps and its six metrics, all a second time at
    # most; then, once for all members of a scan, activations of at most ten floats a pixel of the batch.
    least = 4 * parameters + 50 * 500 * 4
    assert least <= each < 2.2 * least
    assert images < needed(BASE, 3) - 3 * each < images + 500 * 64 * 4 * 10


@pytest.mark.long
def test_a_planned_stack_fits_as_the_compiler_counts_it(measured, monkeypatch):
    """For every amount of memory, a stack of the planned size needs no more than there is."""
    images = load(BASE.data)
    total = {members: needed(BASE, members) for members in (1, 2, 3, 5)}
    count = Program.needed_bytes
    monkeypatch.setattr(Program, "needed_bytes", lambda self, members: total.get(members) or count(self, members))
    for room in (total[1], (total[1] + total[2]) // 2, total[2], (total[2] + total[3]) // 2, total[3], total[5]):
        monkeypatch.setattr(sweeps, "available_bytes", lambda mesh, room=room: room)
        size = sweeps._stack(BASE, images, "scan", 5, None)[0]
        assert total[size] <= room


@pytest.mark.long
def test_members_that_do_not_fit_take_turns(measured, alone, trained, monkeypatch, tmp_path):
    grid = Sweep((0.5, 1.0, 2.0, 4.0, 8.0), (Optimal(),), 1)
    monkeypatch.setattr(sweeps, "available_bytes", lambda mesh: (needed(BASE, 2) + needed(BASE, 3)) // 2)
    result = run_sweep(BASE, grid, tmp_path / "sweep")
    members = grid.members(BASE)
    assert result.finished == [member.name for member in members]
    names = result.finished
    assert trained == [names[:2], names[2:4], names[4:]]
    for member in (members[0], members[1], members[-1]):
        check_same(tmp_path / "sweep" / "members" / member.name, alone(member.config))


@pytest.mark.parametrize("room", [1, 2, 3])
@pytest.mark.parametrize(
    ("devices", "members", "parameters", "activations"),
    [
        *((devices, members, 0, 80) for devices, members in ((1, 5), (8, 5), (8, 7), (6, 5))),
        *((devices, members, 80, 0) for devices, members in ((1, 5), (6, 5), (8, 16), (8, 5), (8, 7), (8, 9))),
    ],
)
def test_no_turn_needs_more_than_there_is(devices, members, parameters, activations, room, monkeypatch):
    """Room for `room` members on each device; the devices that share a batch share its activations, not the parameters."""
    config = dataclasses.replace(BASE, devices=devices, batch_size=504, epochs=1)
    images = load(config.data)

    def each(mesh):
        return parameters + activations // mesh.shape["data"]

    def needed(self, count):
        return 100 + member_slots(self.mesh, count) // self.mesh.shape["member"] * each(self.mesh)

    monkeypatch.setattr(Program, "needed_bytes", needed)
    monkeypatch.setattr(sweeps, "available_bytes", lambda mesh: 100 + 80 * room)
    size = sweeps._stack(config, images, "scan", members, None)[0]
    turns = -(-members // size)
    for turn in [size] * (turns - 1) + [members - size * (turns - 1)]:
        mesh = sweep_mesh(devices, turn, 504)
        per_device = member_slots(mesh, turn) // mesh.shape["member"]
        assert per_device * each(mesh) <= 80 * room


@pytest.mark.parametrize(("total", "size"), [(799, 4), (400, 4), (399, 3), (199, 1), (100, 1), (99, None)])
def test_cpu_devices_that_no_member_uses_take_no_memory(total, size, monkeypatch):
    """8 members of 100 bytes, on as many CPU devices as there are members at once, of the 8 that share the memory."""
    config = dataclasses.replace(BASE, devices=None, batch_size=504, epochs=1)
    monkeypatch.setattr(Program, "needed_bytes", lambda self, count: 100)
    monkeypatch.setattr(sweeps, "available_bytes", lambda mesh: total // len(mesh.local_devices))
    if size is None:
        with pytest.raises(UserError, match="Not one member fits"):
            sweeps._stack(config, load(config.data), "scan", 8, None)
        return
    assert sweeps._stack(config, load(config.data), "scan", 8, None)[0] == size


# --- What is wrong ----------------------------------------------------------------------------------------------------


def refused(sentence, folder, config=BASE, grid=THREE, **settings):
    """The sweep is refused in one sentence, and the folder is as it was."""
    before = contents(folder) if folder.is_dir() else None
    with pytest.raises(UserError, match=sentence):
        run_sweep(config, grid, folder, **settings)
    assert (contents(folder) if folder.is_dir() else None) == before


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        ({}, {"members_at_once": 0}, r"^members_at_once must be a whole number >= 1, got 0\.$"),
        ({}, {"members_at_once": -2}, r"^members_at_once must be a whole number >= 1, got -2\.$"),
        ({}, {"members_at_once": 2, "execution": "loop"}, r"^Execution 'loop' trains one member at a time; leave out "),
        ({"batch_size": 2000}, {}, "batch_size 2000 exceeds the 1500 training images of digits"),
        ({"latent_size": 65}, {}, "latent_size 65 exceeds the 64 pixels"),
        ({"devices": 9}, {}, r"devices must lie in 1 \.\.\. 8"),
        ({"devices": 8, "execution": "loop"}, {}, "batch_size 500 does not divide over 8 devices; 496 would"),
        ({"data": Arrays("nowhere.npz")}, {}, "There is no file 'nowhere.npz'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(change, settings, sentence, tmp_path):
    settings |= {"execution": change["execution"]} if "execution" in change else {}
    config = dataclasses.replace(BASE, **{name: value for name, value in change.items() if name != "execution"})
    refused(sentence, tmp_path / "sweep", config, **settings)


MEMORY = [
    (
        2.5,
        3,
        r"^3 members at once do not fit into the memory of a device, 2 do: they need .* MiB of .* --members-at-once 2, or",
    ),
    (0.5, None, r"^Not one member fits into the memory of a device: it needs .* MiB of .* MiB\. Use a smaller batch_size"),
    (-1.0, None, r"^Not one member fits into the memory of a device: "),
    (0.5, 1, r"^Not one member fits into the memory of a device: "),
]


@pytest.fixture
def room(monkeypatch):
    """Makes room for this many members."""

    def make(members):
        fixed, each = 1000, 10
        monkeypatch.setattr(Program, "needed_bytes", lambda self, count: fixed + count * each)
        monkeypatch.setattr(sweeps, "available_bytes", lambda mesh: fixed + int(members * each))

    return make


@pytest.mark.parametrize(("members", "at_once", "sentence"), MEMORY)
def test_members_that_do_not_fit_into_memory(members, at_once, sentence, room, tmp_path):
    room(members)
    refused(sentence, tmp_path / "sweep", members_at_once=at_once)


@pytest.mark.long
def test_more_at_once_than_there_are_members_is_no_mistake(three, room, tmp_path):
    room(3.5)
    assert run_sweep(BASE, THREE, tmp_path / "sweep", members_at_once=50).finished == NAMES


def test_a_workdir_of_another_sweep_is_left_alone(three):
    change = dataclasses.replace(BASE, latent_size=3, optimizer=Optimizer(ema_decay=0.9, learning_rate=0.5))
    refused(r"another config \(latent_size: 4 -> 3; optimizer.learning_rate: 0.001 -> 0.5\)", three, change)
    # What a sweep varies may be anything in the base.
    assert run_sweep(dataclasses.replace(BASE, beta=9.0, decoder_variance=Learned()), THREE, three).finished == NAMES


def test_a_member_of_another_floor_is_not_taken_for_this_one(three):
    grid = dataclasses.replace(THREE, decoder_variance=(Optimal(floor=0.1),))
    refused(r"holds a run of another config \(decoder_variance.floor: None -> 0.1\)", three, grid=grid)


def test_a_foreign_folder_is_left_alone(three, tmp_path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("...")
    refused("is not empty and not a sweep of bsvae; choose another --workdir", foreign)
    assert [path.name for path in foreign.iterdir()] == ["chapter1.tex"]
    refused("is not empty and not a sweep of bsvae", three / "members" / NAMES[0])  # a run


def test_a_file_is_left_alone(tmp_path):
    (tmp_path / "sweep").write_text("precious")
    refused("is a file; --workdir must name a folder", tmp_path / "sweep")
    assert (tmp_path / "sweep").read_text() == "precious"


@pytest.mark.parametrize("folder", ["/dev/null/sweep", "/proc/sweep"])
def test_a_folder_that_cannot_be_written(folder):
    with pytest.raises(UserError, match=f"^{folder} cannot be written"):
        run_sweep(BASE, THREE, folder)


@pytest.mark.long
def test_a_second_process_is_kept_out(three):
    with (three / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("Another process is sweeping in .*; choose another --workdir", three)
    assert run_sweep(BASE, THREE, three).finished == NAMES


def test_other_data_under_the_same_config_are_refused(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (20, 4, 4), np.uint8))
    config = dataclasses.replace(BASE, data=Arrays(str(path)), batch_size=9, latent_size=2)
    with sweeps._SweepDirectory(tmp_path / "sweep", config, load(config.data), THREE.members(config)):
        pass
    np.save(path, np.random.default_rng(1).integers(0, 256, (20, 4, 4), np.uint8))
    refused("was trained on other images of images", tmp_path / "sweep", config)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "sweep.json is damaged"),
        ("[]", "sweep.json is damaged"),
        ('{"format": 1}', "sweep.json is damaged"),
        ('{"format": 99}', r"written by a newer bsvae_jax \(format 99, this one knows 1\)"),
    ],
)
def test_a_damaged_record(text, sentence, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(text)
    refused(sentence, tmp_path / "sweep")
    with pytest.raises(UserError, match=sentence):
        read_sweep(tmp_path / "sweep")


@pytest.mark.long
def test_reading_what_is_no_sweep(alone, tmp_path):
    with pytest.raises(UserError, match=r"is not a sweep: it has no sweep\.json"):
        read_sweep(tmp_path)
    with pytest.raises(UserError, match="is not a sweep"):
        read_sweep(alone(THREE.members(BASE)[0].config))
