"""A file with an own network, decoder variance and data set, as README shows it: every command, and Python."""

import dataclasses
import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import main, readme_block, refused

import bsvae_jax as bv
from bsvae_jax.config import load_config, to_dict
from bsvae_jax.errors import UserError
from bsvae_jax.random import make_key
from bsvae_jax.training.state import build_model, create_state

SMALL = ("--epochs", "2", "--evaluate-every", "1", "--devices", "1")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(readme_block("mine.py"))
    return file


@pytest.fixture(scope="module")
def run(mine):
    """Of another width than the file's."""
    config = load_config(mine)
    network = dataclasses.replace(config.network, width=4)
    small = dataclasses.replace(config, network=network, epochs=2, evaluate_every=1, devices=1)
    return bv.fit(small, mine.parent / "run", progress=False).workdir


def test_the_run_is_that_of_the_file(mine, run):
    saved = json.loads((run / "config.json").read_text())["config"]
    assert saved["network"] == {"kind": "mine:OverTime", "width": 4}
    assert saved["data"] == {"kind": "mine:Waves", "validation": None}
    opened = bv.restore(run, config=mine)
    assert opened.image_shape == (64, 3)
    assert type(opened.config.network).__name__ == "OverTime"
    # Its own distortion in float64: one variance for each channel.
    x = jnp.asarray(load_config(mine).data.load().test)
    output = opened.model.apply(opened.variables, x, make_key(0))
    terms = opened.model.apply(opened.variables, x, make_key(0), method="elbo_terms")
    squares = np.square(np.float64(x) - np.float64(output.decoded.mean))
    variance = squares.mean(1, keepdims=True) + 1e-6
    expected = 0.5 * (np.log(2 * np.pi * variance) + squares / variance).sum((1, 2))
    np.testing.assert_allclose(terms.distortion, expected, rtol=1e-4)


@pytest.mark.long
def test_the_commands_of_the_readme(mine, monkeypatch, capsys):
    monkeypatch.chdir(mine.parent)
    lines = [
        line.partition("#")[0].replace("runs/mine-sweep", "sweep").replace("runs/mine", "commanded")
        for line in readme_block("commands of mine.py").splitlines()
    ]
    commands = [line.split()[1:] for line in lines]
    assert [command[0] for command in commands] == ["train", "sweep", "evaluate", "sample", "report"]
    for command in commands:
        main(*command, *(SMALL if command[0] in ("train", "sweep") else ()))
    assert json.loads(Path("commanded/config.json").read_text())["config"]["network"] == {"kind": "mine:OverTime", "width": 16}
    assert np.load("commanded/samples.npz")["images"].shape == (64, 64, 3)
    assert {path.name for path in Path("sweep/members").iterdir()} == {"per_channel_beta0.5_seed0", "per_channel_beta2_seed0"}
    assert "per channel" in Path("sweep/report.html").read_text()
    assert "rate" in capsys.readouterr().out


class StopAfterOneEpoch(bv.Callback):
    def on_checkpoint(self, *_, **__):
        signal.raise_signal(signal.SIGTERM)


def test_interrupted_and_resumed_is_the_same(mine, run, tmp_path):
    config = bv.restore(run, config=mine).config
    with pytest.raises(bv.Interrupted):
        bv.fit(config, tmp_path / "run", progress=False, callbacks=[StopAfterOneEpoch()])
    bv.fit(config, tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


def test_a_class_that_is_not_loaded(mine, run, tmp_path, capsys):
    """A run of a file of another name, which is not there: nothing of a run folder is imported."""
    values = json.loads((run / "config.json").read_text())
    values["config"]["network"]["kind"] = "gone:Network"
    del values["digest"]
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"needs the class Network of gone.py, which is not loaded.*--config gone.py"):
        bv.restore(other)
    assert "--config gone.py" in refused(capsys, "evaluate", other)
    file = tmp_path / "gone.py"
    file.write_text(mine.read_text())
    assert "Network of gone.py, which has no such Network any more" in refused(capsys, "evaluate", other, "--config", file)


WRONG = {
    "no kind": ("network=OverTime", "network must be an instance of a class derived from bsvae_jax.Network, got the class"),
    "not frozen": ("network=Thawed()", "Thawed must be a frozen dataclass; write @dataclass\\(frozen=True\\)"),
    "not hashable": ("network=OverTime(width=[4])", "OverTime must be hashable"),
    "one module": ("network=OneModule()", "build of OneModule must return two flax.linen modules"),
    "one output": ("network=OneOutput()", "encoder OneOutputEncoder must return two arrays, mean and log-variance"),
    "wrong latents": (
        "network=WrongLatents()",
        "mean that the encoder Encoder returns must have shape .*4\\), got .*5\\)",
    ),
    "wrong mean": (
        "network=WrongMean()",
        "decoder Decoder must return shape .*64, 3\\), got .*64, 2\\)",
    ),
    "a function": (
        "network=Activated()",
        "network: config.json cannot hold activation of Activated, <built-in function len>.*give the name as text",
    ),
    "a path": ("data=Filed()", r"data: config.json cannot hold path of Filed, PosixPath\('x.npy'\)"),
    "a scalar": (
        "decoder_variance=Scalar()",
        "distortion of Scalar must return the variance and a value in nats",
    ),
}
CLASSES = """

class Thawed(OverTime):
    pass


class OneOutputEncoder(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


@dataclass(frozen=True)
class OneModule(OverTime):
    def build(self, *arguments):
        return Encoder(4, 4)


@dataclass(frozen=True)
class OneOutput(OverTime):
    def build(self, *arguments):
        return OneOutputEncoder(), Decoder((64, 3), 4)


@dataclass(frozen=True)
class WrongLatents(OverTime):
    def build(self, *arguments):
        return Encoder(5, 4), Decoder((64, 3), 4)


@dataclass(frozen=True)
class WrongMean(OverTime):
    def build(self, *arguments):
        return Encoder(4, 4), Decoder((64, 2), 4)


@dataclass(frozen=True)
class Activated(OverTime):
    activation: object = len


@dataclass(frozen=True)
class Filed(Waves):
    path: object = __import__("pathlib").Path("x.npy")


@dataclass(frozen=True)
class Scalar(PerChannel):
    def distortion(self, *arguments):
        variance, distortion = super().distortion(*arguments)
        return variance, distortion.mean()
"""


@pytest.mark.parametrize("case", WRONG)
def test_wrong_classes_end_in_a_sentence_before_training(mine, tmp_path, case, capsys, unchecked):
    change, sentence = WRONG[case]
    field = change.partition("=")[0]
    text = re.sub(rf"{field}=\w+\(\)(?=, \w+=)", change, mine.read_text(), count=1)
    assert text != mine.read_text()
    file = tmp_path / "wrong.py"
    file.write_text(text.replace("\n\ndef get_config", CLASSES + "\n\ndef get_config"))
    said = refused(capsys, "train", file, *SMALL, "--workdir", tmp_path / "run")
    assert re.search(sentence, said), said
    assert not (tmp_path / "run").exists()


def test_a_dataclass_that_is_not_frozen(mine, tmp_path, capsys):
    """Python refuses it while the file is run."""
    file = tmp_path / "thawed.py"
    file.write_text(mine.read_text().replace("@dataclass(frozen=True)\nclass PerChannel", "@dataclass\nclass PerChannel"))
    assert "thawed.py: a kind must be a frozen dataclass; write @dataclass(frozen=True)." in refused(capsys, "train", file)


# --- An optimizer ------------------------------------------------------------------------------------------------------

MOMENTUM = """
from dataclasses import dataclass

import bsvae_jax as bv
import optax


@dataclass(frozen=True)
class Momentum(bv.Optimizer):
    momentum: float = 0.9

    def build(self, schedule, mask):
        return optax.sgd(schedule, self.momentum)


def get_config():
    optimizer = Momentum(learning_rate=1e-3, schedule="constant")
    return bv.Config(network=bv.config.Linear(), latent_size=2, optimizer=optimizer, batch_size=500)
"""
OPTIONS = (*SMALL, "--optimizer.momentum", "0.8", "--optimizer.learning-rate", "2e-3")


@pytest.fixture(scope="module")
def momentum(tmp_path_factory):
    file = tmp_path_factory.mktemp("optimizer") / "momentum.py"
    file.write_text(MOMENTUM)
    return file


@pytest.mark.long
def test_an_optimizer_of_ones_own_makes_its_steps(momentum):
    """Two steps by hand, v = 0.9 v + g and p = p - 1e-3 v, with gradients of the objective itself."""
    config = load_config(momentum)
    model = build_model(config, (3, 2, 1))
    state = create_state(config, model, steps=2)
    x, key = jnp.asarray(np.random.default_rng(0).random((4, 3, 2, 1)), jnp.float32), make_key(1)

    def gradient(params):
        return jax.grad(lambda p: bv.mean_objective(model.apply({"params": p}, x, key, method="elbo_terms"), 1.0))(params)

    expected, velocity = state.params, jax.tree.map(jnp.zeros_like, state.params)
    for _ in range(2):
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient(expected))
        expected = jax.tree.map(lambda p, v: p - 1e-3 * v, expected, velocity)
        state, _ = bv.train_step(state, x, key, beta=1.0)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def momentum_run(momentum):
    main("train", momentum, *OPTIONS, "--workdir", momentum.parent / "run")
    return momentum.parent / "run"


@pytest.mark.long
def test_an_optimizer_of_ones_own_is_written_opened_and_resumed(momentum, momentum_run, tmp_path):
    saved = json.loads((momentum_run / "config.json").read_text())["config"]["optimizer"]
    assert (saved["kind"], saved["momentum"], saved["learning_rate"]) == ("momentum:Momentum", 0.8, 2e-3)
    config = bv.restore(momentum_run, config=momentum).config
    with pytest.raises(bv.Interrupted):
        bv.fit(config, tmp_path / "parts", progress=False, callbacks=[StopAfterOneEpoch()])
    bv.fit(config, tmp_path / "parts", progress=False)
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == (momentum_run / "metrics.jsonl").read_text()


@pytest.mark.long
def test_a_sweep_with_an_optimizer_of_ones_own(momentum, momentum_run, tmp_path):
    """Two learning rates in one program; one of them is that of the run."""
    config = bv.restore(momentum_run, config=momentum).config
    grid = bv.Sweep(beta=(1.0,), decoder_variance=(bv.Optimal(),), seeds=1, learning_rate=(1e-3, 2e-3))
    result = bv.fit_sweep(config, grid, tmp_path, progress=False)
    (name,) = [name for name in result.finished if "rate0.001" not in name]
    member, alone = (bv.read_metrics(folder)[-1] for folder in (tmp_path / "members" / name, momentum_run))
    assert member["objective"] == pytest.approx(alone["objective"], rel=1e-5)


@dataclass(frozen=True)
class Fixed(bv.DecoderVariance):
    """A constant whose number the compiled program takes as an array."""

    variance: float = 0.1
    traced: ClassVar[tuple[str, ...]] = ("variance",)

    def distortion(self, residual_squared, log_variance, axis_name):
        variance = jnp.asarray(self.variance, residual_squared.dtype)
        terms = jnp.log(2 * jnp.pi * variance) + residual_squared / variance
        return variance, 0.5 * jnp.sum(terms, axis=tuple(range(1, terms.ndim)))


SMALL_DIGITS = bv.Config(data=bv.data.Digits(), network=bv.config.MLP((8,)), latent_size=2, epochs=2, batch_size=500, devices=1)


def test_members_are_evaluated_with_their_own_number_of_a_traced_field(tmp_path):
    """One program for both; the distortion of the test set is that of its squared error: D/2 log(2 pi v) + SSE / (2 v)."""
    grid = bv.Sweep(beta=(1.0,), decoder_variance=(Fixed(0.05), Fixed(0.2)), seeds=1)
    bv.fit_sweep(SMALL_DIGITS, grid, tmp_path, execution="vmap", progress=False)
    for variance in (0.05, 0.2):
        folder = tmp_path / "members" / f"fixed-{variance}_beta1_seed0"
        report = json.loads((folder / "evaluation.json").read_text())["splits"]["test"]
        expected = 32 * np.log(2 * np.pi * variance) + 64 * report["mse"]["value"] / (2 * variance)
        assert report["distortion"]["value"] == pytest.approx(expected, rel=1e-5)
        assert report["variance"]["value"] == pytest.approx(variance, rel=1e-6)
        rows = [row for row in bv.read_metrics(folder) if row["split"] == "validation"]
        expected = 32 * np.log(2 * np.pi * variance) + 64 * rows[-1]["mse"] / (2 * variance)
        assert rows[-1]["distortion"] == pytest.approx(expected, rel=1e-5)


def test_the_state_that_fit_returns_has_the_numbers_of_the_config(tmp_path):
    config = dataclasses.replace(SMALL_DIGITS, decoder_variance=bv.Constant(0.05), beta_schedule=bv.TargetRate(12.0))
    result = bv.fit(config, tmp_path / "run", progress=False)
    assert (result.state.model.decoder_variance, result.state.beta_schedule) == (bv.Constant(0.05), bv.TargetRate(12.0))
    x, key = jnp.asarray(result.images.test[:8]) / 16, make_key(3)
    opened = bv.restore(tmp_path / "run")
    for model in (result.state.model, opened.model):
        output = model.apply(opened.variables, x, key)
        squares = np.square(np.float64(x) - np.float64(output.decoded.mean)).sum((1, 2, 3))
        expected = 32 * np.log(2 * np.pi * 0.05) + squares / 0.1
        terms = model.apply(result.state.variables(), x, key, method="elbo_terms")
        np.testing.assert_allclose(terms.distortion, expected, rtol=1e-5)
    state, metrics = jax.jit(bv.train_step)(result.state, x, key, 1.0)
    assert int(state.step) == int(result.state.step) + 1
    np.testing.assert_allclose(metrics.variance, 0.05, rtol=1e-6)


def test_an_optimizer_that_is_none_ends_in_a_sentence(momentum, tmp_path, capsys):
    file = tmp_path / "wrong.py"
    file.write_text(MOMENTUM.replace("optax.sgd(schedule, self.momentum)", "schedule"))
    said = refused(capsys, "train", file, *SMALL, "--workdir", tmp_path / "run")
    assert "build of Momentum must return an optax.GradientTransformation, got" in said
    assert not (tmp_path / "run").exists()


def test_names_and_values_survive_a_file(mine):
    config = load_config(mine)
    assert to_dict(config)["decoder_variance"] == {"kind": "mine:PerChannel"}
    assert load_config(mine) == config
