"""A run that begins with the weights of another, and one that goes on under a changed config."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest

import bsvae_jax as bv
from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import MLP, Arrays, Config, Digits, Linear, Mixture, Optimizer
from bsvae_jax.data import load
from bsvae_jax.errors import UserError
from bsvae_jax.models.pytorch import flatten
from bsvae_jax.objective import Learned
from bsvae_jax.training.restore import read_source, start_with
from bsvae_jax.training.start import fitting
from bsvae_jax.training.state import build_model, create_state
from bsvae_jax.training.workdir import RunDirectory, read_info

SMALL = Config(
    data=Digits(validation=None),
    network=MLP((16, 8)),
    latent_size=4,
    epochs=2,
    batch_size=500,
    devices=1,
    optimizer=Optimizer(ema_decay=0.9),
)  # 3 steps an epoch


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished run, and the weights that it is evaluated with."""
    folder = tmp_path_factory.mktemp("start") / "source"
    bv.fit(SMALL, folder, progress=False)
    return folder, jax.device_get(bv.restore(folder).variables)


def beginning(config, folder, source):
    """The state before the first step of a run that begins from another, the state of one that does not, and the sentence."""
    images = load(config.data)
    start = start_with(read_source(source, folder, config), config, images)
    new = create_state(config, build_model(config, images.image_shape, images.bin_width), 6, images=images)
    with RunDirectory(folder, config, images, start=start) as run:
        return run.resume(new), new, start.sentence


# --- Which weights are taken ------------------------------------------------------------------------------------------


def test_a_layer_is_taken_whole():
    own = {"params.encoder.out.kernel": (9, 4), "params.encoder.out.bias": (4,), "params.encoder.norm.scale": (9,)}
    own |= {"batch_stats.encoder.norm.mean": (9,), "params.log_variance": ()}
    assert fitting(own, own) == list(own)
    wider = own | {"params.encoder.out.kernel": (9, 8)}
    assert fitting(wider, own) == [name for name in own if "encoder.out" not in name]
    without = {name: shape for name, shape in own.items() if name != "batch_stats.encoder.norm.mean"}
    assert fitting(own, without) == [name for name in own if "encoder.norm" not in name]
    assert fitting(without, own) == list(without)


@pytest.mark.long
def test_before_the_first_step_the_weights_are_those_of_the_source(source, tmp_path):
    folder, weights = source
    config = dataclasses.replace(SMALL, beta=4.0, decoder_variance=Learned(), prior=Mixture(3), seed=7)
    state, new, sentence = beginning(config, tmp_path / "run", folder)
    for params in (state.params, state.ema_params):
        for part in ("encoder", "decoder"):
            chex.assert_trees_all_equal(params[part], weights["params"][part])
        chex.assert_trees_all_equal(params["prior_model"], new.params["prior_model"])
    chex.assert_trees_all_equal(state.optimizer_state, new.optimizer_state)
    assert "layers start anew: log_variance (log_variance is () here and absent there), prior_model (" in sentence
    assert int(state.step) == 0
    with RunDirectory(tmp_path / "run", config, load(config.data)) as run:
        again = run.resume(new)
    chex.assert_trees_all_equal(again.params, state.params)


@pytest.mark.long
def test_layers_of_other_shapes_start_anew(source, tmp_path):
    """Other data, 5 x 5 and in color, and other latents: the layers at the ends differ, those in the middle fit."""
    folder, weights = source
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 5, 5, 3), np.uint8))
    config = dataclasses.replace(SMALL, data=Arrays(str(tmp_path / "images.npy")), latent_size=3, batch_size=8)
    state, new, sentence = beginning(config, tmp_path / "run", folder)
    own, drawn, there = (flatten({"params": tree}) for tree in (state.params, new.params, weights["params"]))
    fits = {name for name in own if own[name].shape == there[name].shape}
    taken = {name for name in own if np.array_equal(own[name], there[name]) and "bias" not in name}
    assert taken == {name for name in fits if "kernel" in name}
    assert taken
    anew = read_info(tmp_path / "run").started_from["anew"]
    for name in own:
        chex.assert_trees_all_equal(own[name], drawn[name] if name in anew else there[name])
    assert all(name.removeprefix("params.").rpartition(".")[0] in sentence for name in anew)


# --- The record, and what continues ------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_that_began_from_another_goes_on_without_it(source, tmp_path, caplog):
    """Interrupted = uninterrupted, also where the source is gone or was trained further."""
    folder, _ = source
    copy = shutil.copytree(folder, tmp_path / "source")
    config = dataclasses.replace(SMALL, beta=4.0)
    whole = bv.fit(config, tmp_path / "whole", progress=False, start_from=copy)
    fresh = bv.fit(config, tmp_path / "fresh", progress=False)
    assert not np.array_equal(*(jax.tree.leaves(run.state.params)[0] for run in (whole, fresh)))
    record = read_info(tmp_path / "whole").started_from
    assert (record["workdir"], record["step"], record["anew"]) == (str(copy), 6, [])
    assert record["run"] == json.loads((copy / "config.json").read_text())["digest"]

    class Stop(bv.Callback):
        def on_evaluation(self, run, row):
            raise RuntimeError

    with pytest.raises(bv.CallbackError):
        bv.fit(config, tmp_path / "run", progress=False, callbacks=[Stop()], start_from=copy)
    shutil.rmtree(copy)
    for options in ({"start_from": copy}, {}):
        again = shutil.copytree(tmp_path / "run", tmp_path / f"run{len(options)}")
        continued = bv.fit(config, again, progress=False, **options)
        chex.assert_trees_all_equal(continued.state.arrays(), whole.state.arrays())
        assert read_metrics(again) == read_metrics(tmp_path / "whole")
        shutil.rmtree(again / "checkpoints")  # from the beginning, which is that of the source still
        chex.assert_trees_all_equal(bv.fit(config, again, progress=False).state.arrays(), whole.state.arrays())
    with pytest.raises(UserError, match=r"run began from .*/source, not from .*/fresh. Leave out --start-from"):
        bv.fit(config, tmp_path / "run", progress=False, start_from=tmp_path / "fresh")
    with pytest.raises(UserError, match=r"began with weights drawn from its seed, not from"):
        bv.fit(config, tmp_path / "fresh", progress=False, start_from=copy)


@pytest.mark.long
def test_a_kill_while_the_folder_is_made_loses_nothing(source, tmp_path):
    """The weights are written first, and do not make the folder another one's."""
    folder, weights = source
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "start.npz").write_bytes(b"torn")
    state, *_ = beginning(SMALL, tmp_path / "run", folder)
    chex.assert_trees_all_equal(state.params, weights["params"])


@pytest.mark.long
def test_what_cannot_be_begun_from_is_refused_before_anything_is_written(source, tmp_path):
    folder, _ = source
    shutil.copytree(folder, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints"))
    for other, config, sentence in (
        (tmp_path / "nowhere", SMALL, "nowhere is not a run: it has no config.json"),
        (tmp_path / "begun", SMALL, "begun has no checkpoint yet"),
        (tmp_path / "x" / ".." / "run", SMALL, "is the --workdir itself"),
        (
            folder,
            dataclasses.replace(SMALL, network=Linear(), data=Digits()),
            r"\(step 6\) is of another network, of which no layer fits: decoder.mean \(kernel is \(4, 64\) here and \(16, 64\)",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            bv.fit(config, tmp_path / "run", progress=False, start_from=other)
        assert not (tmp_path / "run").exists()
