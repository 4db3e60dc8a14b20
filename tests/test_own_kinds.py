"""A file with an own network, decoder variance and data set, as README shows it: every command, and Python."""

import json
import re
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import main, readme_block, refused

import bsvae_jax as bv
from bsvae_jax.config import load_config, to_dict
from bsvae_jax.errors import UserError
from bsvae_jax.random import make_key

SMALL = ("--epochs", "2", "--devices", "1")


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(readme_block("mine.py"))
    return file


@pytest.fixture(scope="module")
def run(mine):
    """Trained by the command, with an option of its own class."""
    main("train", mine, "--network.width", "4", *SMALL, "--workdir", mine.parent / "run")
    return mine.parent / "run"


def test_the_run_is_that_of_the_file(mine, run):
    saved = json.loads((run / "config.json").read_text())["config"]
    assert saved["network"] == {"kind": "mine:OverTime", "width": 4}
    assert saved["data"] == {"kind": "mine:Waves"}
    opened = bv.restore(run, config=mine)
    assert opened.image_shape == (64, 3)
    assert type(opened.config.network).__name__ == "OverTime"
    # Its own distortion in float64: one variance per channel over the whole batch.
    x = jnp.asarray(load_config(mine).data.load().test)
    output = opened.model.apply(opened.variables, x, make_key(0))
    terms = opened.model.apply(opened.variables, x, make_key(0), method="elbo_terms")
    squares = np.square(np.float64(x) - np.float64(output.decoded.mean))
    variance = squares.mean((0, 1)) + 1e-6
    expected = 0.5 * (np.log(2 * np.pi * variance) + squares / variance).sum((1, 2))
    np.testing.assert_allclose(terms.distortion, expected, rtol=1e-4)


def test_the_commands_of_the_readme(mine, run, monkeypatch, capsys):
    """But for training, which the fixture does; on the run of the fixture."""
    monkeypatch.chdir(mine.parent)
    lines = [
        line.partition("#")[0].replace("runs/mine-sweep", "sweep").replace("runs/mine", "run")
        for line in readme_block("commands of mine.py").splitlines()
    ]
    commands = [line.split()[1:] for line in lines]
    assert [command[0] for command in commands] == ["train", "sweep", "evaluate", "sample", "report"]
    for command in commands[1:]:
        main(*command, *(SMALL if command[0] == "sweep" else ()))
    assert np.load("run/samples.npz")["images"].shape == (64, 64, 3)
    assert {path.name for path in Path("sweep/members").iterdir()} == {"per_channel_beta0.5_seed0", "per_channel_beta2_seed0"}
    assert "per channel" in Path("sweep/report.html").read_text()
    assert "rate" in capsys.readouterr().out


def test_interrupted_and_resumed_is_the_same(mine, run, tmp_path):
    class StopAfterOneEpoch(bv.Callback):
        def on_checkpoint(self, *_, **__):
            signal.raise_signal(signal.SIGTERM)

    config = bv.restore(run, config=mine).config
    with pytest.raises(bv.Interrupted):
        bv.fit(config, tmp_path / "run", progress=False, callbacks=[StopAfterOneEpoch()])
    bv.fit(config, tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


def test_a_class_that_is_not_loaded(mine, run, tmp_path, capsys):
    """A run of a file of another name, which is not there: nothing of a run folder is imported."""
    values = json.loads((run / "config.json").read_text())
    values["config"]["network"]["kind"] = "gone:Network"
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"needs the class Network of gone.py, which is not loaded.*--config gone.py"):
        bv.restore(other)
    assert "--config gone.py" in refused(capsys, "evaluate", other)


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


def test_names_and_values_survive_a_file(mine):
    config = load_config(mine)
    assert to_dict(config)["decoder_variance"] == {"kind": "mine:PerChannel"}
    assert load_config(mine) == config
