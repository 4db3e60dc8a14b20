"""Weights from PyTorch and for elsewhere: the published network in torch.nn, indices written out, files written by hand.

The tests against PyTorch skip where it is not installed. Every other one writes the files of `torch.save` itself.
"""

import collections
import dataclasses
import enum
import functools
import hashlib
import json
import math
import pickle
import shutil
import struct
import types
import zipfile
from itertools import pairwise
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import bsvae_jax as bv
from bsvae_jax import config
from bsvae_jax.cli import main
from bsvae_jax.config import MLP, Arrays, Config, Optimizer, Residual
from bsvae_jax.errors import UserError
from bsvae_jax.models._state_dict import read_state_dict
from bsvae_jax.models.pytorch import counterparts, flatten, unflatten
from bsvae_jax.profiling.torch_vae import torch_network
from bsvae_jax.training.checkpoints import Checkpoints
from bsvae_jax.training.state import build_model

DIGITS, WIDTHS, LATENT = (8, 8, 1), (8, 16), 4
SMALL = Config(network=Residual(WIDTHS), latent_size=LATENT, epochs=1, batch_size=500, devices=1)
CONFIG = """
from bsvae_jax.config import Config, Residual
def get_config():
    return Config(network=Residual((8, 16)), latent_size=4, epochs=1, batch_size=500, devices=1)
"""

SETUPS = {  # image shape, widths, latent size
    "mnist": ((28, 28, 1), (32, 64, 128), 32),
    "celeba": ((64, 64, 3), (32, 64, 128, 256), 64),
    "odd": ((13, 22, 2), (4, 6, 5), 3),
}
every_setup = pytest.mark.parametrize(("shape", "widths", "latent"), SETUPS.values(), ids=SETUPS)


# --- A state_dict without PyTorch -------------------------------------------------------------------------------------


def published_shapes(image_shape, widths, latent, out_channels=None):
    """Name and shape of every array of the published network, written from its description."""
    shapes = {}

    def norm(name, size):
        shapes.update({f"{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    def layer(name, out, *weight):
        shapes.update({f"{name}.weight": weight, f"{name}.bias": (out,)})

    def block(name, before, after, stride):
        layer(f"{name}.conv1.0", after, after, before, 3, 3)
        norm(f"{name}.conv1.1", after)
        layer(f"{name}.conv2.0", after, after, after, 3, 3)
        norm(f"{name}.conv2.1", after)
        if stride != 1 or before != after:
            layer(f"{name}.identity.0", after, after, before, 1, 1)
            norm(f"{name}.identity.1", after)

    height, width, channels = image_shape
    stages = len(widths)
    for stage, (before, after) in enumerate(pairwise((channels, *widths))):
        block(f"encoder.{stage}.0", before, after, 2)
        block(f"encoder.{stage}.1", after, after, 1)
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    flat = widths[-1] * height * width
    layer(f"encoder.{stages}.1", 2 * latent, 2 * latent, flat)
    norm(f"encoder.{stages}.2", 2 * latent)
    layer(f"encoder.{stages}.4", 2 * latent, 2 * latent, 2 * latent)
    layer("decoder.0.0", flat, flat, latent)
    norm("decoder.0.1", flat)
    block("decoder.0.4", widths[-1], widths[-1], 1)
    for stage, (before, after) in enumerate(pairwise((*widths[::-1], widths[0])), start=1):
        layer(f"decoder.{stage}.0", after, before, after, 3, 3)
        norm(f"decoder.{stage}.1", after)
    out = out_channels or channels
    layer(f"decoder.{stages}.3", out, widths[0], out, 3, 3)
    return shapes


def random_arrays(shapes, seed=0):
    """Every array random: no zero bias, unit scale or unit variance hides a missing or misplaced one."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            arrays[name] = np.array(7)
        elif len(shape) > 1:  # unit gain, nearly
            arrays[name] = (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        elif name.endswith(("running_var", "weight")):  # those of a BatchNorm
            arrays[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            arrays[name] = (rng.normal(size=shape) * 0.3).astype(np.float32)
    return arrays


STORAGES = {"float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage", "int64": "LongStorage"}


def write_state_dict(path, arrays, place=None, beside=b""):
    """What `torch.save` writes, instruction by instruction: the state_dict, or one at `place`, beside other things.

    `beside` is a pickle of what else is in the file, as `hyper_parameters`.
    """

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    program = b"\x80\x02}("
    with zipfile.ZipFile(path, "w") as archive:
        for key, (name, array) in enumerate(arrays.items()):
            storage = f"ctorch\n{STORAGES[str(array.dtype)]}\n".encode()
            strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
            program += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
            program += (
                b"(" + text("storage") + storage + text(str(key)) + text("cpu") + b"J" + struct.pack("<i", array.size) + b"tQ"
            )
            program += b"K\x00" + numbers(array.shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
            archive.writestr(f"model/data/{key}", array.tobytes())
        program += b"u"
        if place is not None:
            # {"epoch": 3, "optimizer": {"state": {}, "param_groups": [0.5]}, place: ...}
            groups = b"}(" + text("state") + b"}" + text("param_groups") + b"]G" + struct.pack(">d", 0.5) + b"au"
            if beside:
                groups += text("hyper_parameters") + beside.removesuffix(b".")
            start = b"\x80\x02}(" + text("epoch") + b"K\x03" + text("optimizer") + groups + text(place)
            program = start + program.removeprefix(b"\x80\x02") + b"u"
        archive.writestr("model/data.pkl", program + b".")
        archive.writestr("model/byteorder", "little")
        archive.writestr("model/version", "3\n")
    return path


@pytest.fixture
def arrays():
    return random_arrays(published_shapes(DIGITS, WIDTHS, LATENT))


@pytest.fixture
def save(tmp_path):
    return lambda arrays: write_state_dict(tmp_path / "model.pt", arrays)


def apply(run, *inputs, method):
    """A method of the run's model; compiled, which is faster than operation by operation."""
    return jax.jit(run.model.apply, static_argnames="method")(run.variables, *map(jnp.asarray, inputs), method=method)


# --- The published network in PyTorch ---------------------------------------------------------------------------------


@every_setup
def test_an_imported_network_is_pytorchs(shape, widths, latent, tmp_path):
    """Posterior and reconstruction of the restored run and of the network whose state_dict was saved, both float32."""
    torch = pytest.importorskip("torch")
    network = torch_network(torch, shape, widths, latent)
    shapes = published_shapes(shape, widths, latent)
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == shapes
    network.load_state_dict({name: torch.tensor(array) for name, array in random_arrays(shapes).items()})
    torch.save(network.state_dict(), tmp_path / "model.pt")

    rng = np.random.default_rng(1)
    brightness = np.linspace(0, 1, 5).reshape(-1, 1, 1, 1) * rng.uniform(size=(1, *shape)) + 0.2 * rng.uniform(size=(5, *shape))
    images = (255 / 1.2 * brightness).astype(np.uint8)
    np.savez(tmp_path / "images.npz", train=images, test=images)
    own = Config(data=Arrays(str(tmp_path / "images.npz")), network=Residual(widths), latent_size=latent, batch_size=4)
    imported = bv.import_torch(tmp_path / "model.pt", own, tmp_path / "run")
    assert imported.parameters == sum(parameter.numel() for parameter in network.parameters())

    run = bv.restore(tmp_path / "run")
    x = images.astype(np.float32) / 255
    with torch.no_grad():
        mean, log_variance = network["encoder"](torch.tensor(x.transpose(0, 3, 1, 2))).chunk(2, dim=1)
        z = torch.tensor(rng.normal(size=(5, latent)).astype(np.float32))
        image, sample = (network["decoder"](latents).permute(0, 2, 3, 1) for latents in (mean, z))
    posterior = apply(run, x, method="encode")
    decoded = apply(run, z.numpy(), method="decode").mean
    reconstruction = apply(run, posterior.mean, method="decode").mean
    pairs = {"mean": (posterior.mean, mean), "log-variance": (posterior.log_variance, log_variance)}
    pairs |= {"decoded z": (decoded, sample), "reconstruction": (reconstruction, image)}
    for name, (found, expected) in pairs.items():
        expected = expected.numpy()
        assert np.std(expected, axis=0).max() > 5e-3, f"the {name} of a dead network agrees with anything"
        error = np.abs(np.asarray(found) - expected).max()
        assert error < 1e-4 * max(1.0, np.abs(expected).max()), name


def test_the_files_written_here_are_pytorchs(arrays, save):
    torch = pytest.importorskip("torch")
    found = torch.load(save(arrays), weights_only=True)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), array)


# --- The mapping, index by index --------------------------------------------------------------------------------------


@pytest.mark.long
def test_axes_and_flattened_maps_are_reordered(tmp_path):
    """Channels first to last, also in the features of dense layers; convolutions at single indices."""
    shape, widths, latent = (5, 12, 2), (3, 4), 2  # the smallest map is 2 x 3 with 4 channels
    given = random_arrays(published_shapes(shape, widths, latent))
    np.save(tmp_path / "images.npy", np.zeros((20, *shape), np.uint8))
    own = Config(data=Arrays(str(tmp_path / "images.npy")), network=Residual(widths), latent_size=latent, batch_size=4)
    bv.import_torch(write_state_dict(tmp_path / "model.pt", given), own, tmp_path / "run")
    found = {name: np.asarray(value) for name, value in flatten(bv.restore(tmp_path / "run").variables).items()}
    for h, w, c in np.ndindex(2, 3, 4):
        here, there = (h * 3 + w) * 4 + c, (c * 2 + h) * 3 + w
        np.testing.assert_array_equal(found["params.encoder.hidden.kernel"][here], given["encoder.2.1.weight"][:, there])
        np.testing.assert_array_equal(found["params.decoder.hidden.kernel"][:, here], given["decoder.0.0.weight"][there])
        pairs = {"hidden.bias": "0.bias", "hidden_norm.scale": "1.weight", "hidden_norm.bias": "1.bias"}
        for ours, theirs in pairs.items():
            assert found[f"params.decoder.{ours}"][here] == given[f"decoder.0.{theirs}"][there]
        for ours, theirs in {"mean": "running_mean", "var": "running_var"}.items():
            assert found[f"batch_stats.decoder.hidden_norm.{ours}"][here] == given[f"decoder.0.1.{theirs}"][there]
    np.testing.assert_array_equal(found["params.encoder.posterior.kernel"], given["encoder.2.4.weight"].T)
    assert found["params.encoder.stage1_block0.conv1.kernel"][0, 2, 1, 3] == given["encoder.1.0.conv1.0.weight"][3, 1, 0, 2]
    assert (
        found["params.encoder.stage0_block0.shortcut_conv.kernel"][0, 0, 1, 2]
        == given["encoder.0.0.identity.0.weight"][2, 1, 0, 0]
    )
    assert found["params.decoder.stage0_conv.kernel"][0, 2, 3, 1] == given["decoder.1.0.weight"][3, 1, 0, 2]
    assert found["params.decoder.image.kernel"][2, 1, 2, 0] == given["decoder.2.3.weight"][2, 0, 2, 1]


def test_every_array_has_one_counterpart():
    for shape, widths, latent in SETUPS.values():
        model = build_model(Config(network=Residual(widths), latent_size=latent), shape)
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)), jax.random.key(1))
        named = {part.name: part.shape for part in counterparts(variables, widths, shape).values()}
        expected = published_shapes(shape, widths, latent)
        assert named == {name: value for name, value in expected.items() if not name.endswith("num_batches_tracked")}


# --- The run that an import leaves ------------------------------------------------------------------------------------


@pytest.fixture
def imported(arrays, save, tmp_path):
    (tmp_path / "small.py").write_text(CONFIG)
    path = save(arrays)
    main.main(["import-torch", str(path), str(tmp_path / "small.py"), "--beta", "2", "--workdir", str(tmp_path / "run")])
    return tmp_path / "run"


@pytest.mark.long
def test_imported_weights_that_are_lost_are_not_drawn_anew(imported):
    shutil.rmtree(imported / "checkpoints")
    with pytest.raises(bv.UserError, match="has no checkpoint, and with them the imported weights are gone"):
        bv.fit(dataclasses.replace(bv.load_config(imported.parent / "small.py"), beta=2.0), imported, progress=False)


@pytest.mark.long
@pytest.mark.usefixtures("unchecked")
def test_an_imported_run_is_evaluated_and_sampled_like_any_other(imported, capsys):
    run = bv.restore(imported)
    assert (run.step, run.calibration, run.config.beta, run.image_shape, run.levels) == (0, None, 2.0, DIGITS, 17)
    main.main(["evaluate", str(imported), "--no-figures"])
    assert "calibrated_elbo" in capsys.readouterr().out
    report = json.loads((imported / "evaluation.json").read_text())
    test = {name: quantity["value"] for name, quantity in report["splits"]["test"].items()}
    assert report["step"] == 0
    assert test["objective"] == pytest.approx(test["distortion"] + 2 * test["rate"])

    images = bv.data.load(run.config.data)
    x = jnp.asarray(images.test, jnp.float32) / 16
    mean, log_variance = apply(run, x, method="encode")
    rate = 0.5 * np.sum(np.exp(log_variance) - 1 - log_variance + np.square(mean), axis=1).mean()
    assert test["rate"] == pytest.approx(float(rate), rel=1e-4)

    main.main(["sample", str(imported), "--count", "3", "--out", str(imported.parent / "three.npz")])
    with np.load(imported.parent / "three.npz") as samples:
        assert samples["images"].shape == (3, *DIGITS)
        assert np.ptp(samples["images"]) > 0


def test_the_run_says_where_it_is_from(imported, capsys):
    sha256 = hashlib.sha256((imported.parent / "model.pt").read_bytes()).hexdigest()
    expected = {"kind": "state_dict of PyTorch", "file": "model.pt", "sha256": sha256}
    assert json.loads((imported / "config.json").read_text())["imported"] == expected
    with Checkpoints(imported / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints._manager.metadata(0).custom_metadata["imported"] == expected


@pytest.mark.long
def test_training_goes_on_from_imported_weights(save, tmp_path):
    optimizer = Optimizer(learning_rate=1e-30, ema_decay=0.9)
    own = bv.Config(**{**vars(SMALL), "network": Residual((4,)), "optimizer": optimizer})
    bv.import_torch(save(random_arrays(published_shapes(DIGITS, (4,), LATENT))), own, tmp_path / "run")
    before = bv.restore(tmp_path / "run")
    bv.fit(own, tmp_path / "run", progress=False)
    after = bv.restore(tmp_path / "run")
    assert (before.step, after.step) == (0, 3)
    # An average of equal parameters is that parameter up to rounding.
    chex.assert_trees_all_close(after.variables["params"], before.variables["params"], rtol=1e-6)
    moved = jax.tree.map(
        lambda one, other: np.any(one != other), after.variables["batch_stats"], before.variables["batch_stats"]
    )
    assert all(jax.tree.leaves(moved)), "statistics follow the data whatever the learning rate"
    assert "imported" in json.loads((tmp_path / "run" / "config.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_precisions_become_float32(dtype, arrays, save, tmp_path):
    given = {name: array if array.dtype == int else array.astype(dtype) for name, array in arrays.items()}
    bv.import_torch(save(given), SMALL, tmp_path / "run")
    kernel = bv.restore(tmp_path / "run").variables["params"]["encoder"]["posterior"]["kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, given["encoder.2.4.weight"].T.astype(np.float32))


# --- Decoder variances ------------------------------------------------------------------------------------------------


def with_variance(decoder_variance):
    return bv.Config(**{**vars(SMALL), "decoder_variance": decoder_variance})


@pytest.mark.long
@pytest.mark.parametrize("variance", [bv.Constant(0.25), bv.Optimal(), bv.Optimal("batch"), bv.Optimal("pixel")], ids=repr)
def test_variances_without_parameters_take_the_same_file(variance, arrays, save, tmp_path):
    bv.import_torch(save(arrays), with_variance(variance), tmp_path / "run")
    run = bv.restore(tmp_path / "run")
    terms = apply(run, jnp.full((2, *DIGITS), 0.5), jax.random.key(0), method="elbo_terms")
    assert np.isfinite(terms.distortion).all()
    if isinstance(variance, bv.Constant):
        np.testing.assert_allclose(terms.distortion, 32 * np.log(2 * np.pi * 0.25) + 64 * terms.mse / 0.5, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learned_variance_is_one_number_of_the_file(shape, arrays, save, tmp_path):
    given = arrays | {"log_variance": np.full(shape, -2.5, np.float32)}
    bv.import_torch(save(given), with_variance(bv.Learned()), tmp_path / "run")
    run = bv.restore(tmp_path / "run")
    decoded = apply(run, jnp.zeros((1, LATENT)), method="decode")
    assert decoded.log_variance.shape == ()
    assert float(decoded.log_variance) == -2.5
    with pytest.raises(UserError, match=r"has a learned log_variance.* choose --decoder-variance learned"):
        bv.import_torch(save(given), SMALL, tmp_path / "other")


def test_a_learned_variance_that_the_file_lacks(arrays, save, tmp_path):
    with pytest.raises(UserError, match=r"has no log_variance, the one parameter of Learned\(\).*optimal or constant"):
        bv.import_torch(save(arrays), with_variance(bv.Learned()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_predicted_variance_comes_from_further_channels(arrays, save, tmp_path):
    given = random_arrays(published_shapes(DIGITS, WIDTHS, LATENT, out_channels=2))
    predicted = with_variance(bv.Predicted())
    bv.import_torch(save(given), predicted, tmp_path / "run")
    run = bv.restore(tmp_path / "run")
    halves = {name: value[..., :1] for name, value in run.variables["params"]["decoder"]["image"].items()}
    params = run.variables["params"] | {"decoder": run.variables["params"]["decoder"] | {"image": halves}}
    z = jnp.ones((2, LATENT))
    found = apply(run, z, method="decode")
    single = build_model(with_variance(bv.Optimal()), DIGITS, 1 / 16)
    means = run._replace(model=single, variables=run.variables | {"params": params})
    alone = apply(means, z, method="decode")
    np.testing.assert_allclose(found.mean, alone.mean, rtol=1e-6)
    assert found.log_variance.shape == (2, *DIGITS)
    with pytest.raises(UserError, match=r"decoder\.2\.3\.weight \(8, 1, 3, 3\) instead of \(8, 2, 3, 3\).*twice the channels"):
        bv.import_torch(save(arrays), predicted, tmp_path / "other")


# --- Files that are not imported --------------------------------------------------------------------------------------


def refused(given, save, tmp_path, own=SMALL):
    with pytest.raises(UserError) as error:
        bv.import_torch(save(given), own, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "model.pt" in str(error.value)
    return str(error.value)


def test_weights_of_another_network_are_refused_by_name(arrays, save, tmp_path):
    """Counted by hand: a BatchNorm has 4 arrays and a convolution 2; the block that is left out has no shortcut."""
    less = {name: array for name, array in arrays.items() if not name.startswith("encoder.0.1.")}
    text = refused(less | {"fc.weight": np.zeros((3, 4), np.float32)}, save, tmp_path)
    assert "12 missing (encoder.0.1.conv1.0.bias, encoder.0.1.conv1.0.weight, encoder.0.1.conv1.1.bias and 9 more); " in text
    assert "1 left over (fc.weight). " in text
    text = refused(arrays | {"encoder.0.0.conv1.0.weight": np.zeros((8, 3, 5, 5), np.float32)}, save, tmp_path)
    assert "1 of another shape (encoder.0.0.conv1.0.weight (8, 3, 5, 5) instead of (8, 1, 3, 3))" in text
    assert "Residual(widths=(8, 16)), latent_size 4, on images (8, 8, 1)" in text


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"latent_size": 5}, "of another shape (encoder.2.1.weight (8, 64) instead of (10, 64)"),
        ({"network": Residual((8, 12))}, "of another shape (encoder.1.0.conv1.0."),
        ({"network": Residual((8, 16, 16))}, "missing"),
    ],
)
def test_a_config_of_another_network(changed, sentence, arrays, save, tmp_path):
    text = refused(arrays, save, tmp_path, bv.Config(**{**vars(SMALL), **changed}))
    assert sentence in text
    assert "widths, latent_size and images" in text


def test_a_config_that_is_not_residual(arrays, save, tmp_path):
    with pytest.raises(UserError, match=r"residual, this config has MLP.*choose --network residual"):
        bv.import_torch(save(arrays), bv.Config(**{**vars(SMALL), "network": MLP()}), tmp_path / "run")


def test_weights_that_are_not_finite(arrays, save, tmp_path):
    name = "decoder.1.1.running_mean"
    for bad in (np.nan, np.inf):
        given = arrays | {name: np.where(np.arange(8) == 3, bad, arrays[name]).astype(np.float32)}
        assert f"not finite in float32: {name}." in refused(given, save, tmp_path)
    assert "not finite in float32" in refused(arrays | {name: np.full(8, 1e300)}, save, tmp_path)
    variance = "decoder.1.1.running_var"
    assert f"below 0: {variance}." in refused(arrays | {variance: -arrays[variance]}, save, tmp_path)


def test_files_that_are_no_state_dict(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(UserError, match="cannot be read"):
        bv.import_torch(path, SMALL, tmp_path / "run")
    path.write_bytes(b"\x80\x02cos\nsystem\nX\x09\x00\x00\x00touch RAN\x85R.")
    with pytest.raises(UserError, match="refused: it does not begin like one"):
        bv.import_torch(path, SMALL, tmp_path / "run")
    path.write_bytes(b"weights")
    with pytest.raises(UserError, match=r"model\.pt"):
        bv.import_torch(path, SMALL, tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("place", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "vae."])
def test_what_training_scripts_save(place, prefix, arrays, tmp_path, caplog):
    named = {prefix + name: array for name, array in arrays.items()}
    path = write_state_dict(tmp_path / "model.pt", named, place)
    with caplog.at_level("INFO", "bsvae_jax"):
        found = read_state_dict(path)
    assert list(found) == list(arrays)
    jax.tree.map(np.testing.assert_array_equal, found, arrays)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert (f"every name begins with {prefix!r}, which was dropped" in said) == bool(prefix)
    assert (f"Of the entries epoch, optimizer, {place} the tensors of {place!r} are read" in said) == (place is not None)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Activation(enum.Enum):
    RELU = 1


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_beside_the_state_dict_are_never_built(protocol, arrays, tmp_path):
    ran = tmp_path / "RAN"
    hyperparameters = {
        "class": collections.Counter,
        "enum": Activation.RELU,
        "path": Path("x"),
        "namespace": types.SimpleNamespace(a=1),
        "partial": functools.partial(int, base=2),
        "dict": collections.defaultdict(list, a=[1]),
        "set": {1, 2},
        "frozen": frozenset([1]),
        "array": np.arange(3.0),
        "number": np.float32(2),
        "large": 10**300,
        "bytes": b"b",
        "deque": collections.deque([1, 2]),
        "complex": 1j,
        "nested": [({"a": slice(1, 2)},)],
        "call": Touch(ran),
        "options": bv.Config(),
    }
    named = {f"model.{name}": array for name, array in arrays.items()}
    for kept in ({"all": hyperparameters}, *({name: value} for name, value in hyperparameters.items())):
        path = write_state_dict(tmp_path / "last.ckpt", named, "state_dict", pickle.dumps(kept, protocol))
        jax.tree.map(np.testing.assert_array_equal, read_state_dict(path), arrays)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Touch(ran)))
    assert ran.exists(), "the file would have shown it"


def test_a_module_in_place_of_its_state_dict_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(types.SimpleNamespace(weight=1), 2))
    with pytest.raises(
        UserError, match=r"no named tensors, but an object of types.SimpleNamespace.*torch.save\(module.state_d"
    ):
        read_state_dict(tmp_path / "model.zip")


def test_a_prefix_of_some_names_is_a_part_of_them(tmp_path):
    named = {"module.weight": np.ones(2, np.float32), "head.weight": np.ones(3, np.float32)}
    assert list(read_state_dict(write_state_dict(tmp_path / "model.pt", named))) == list(named)


def test_safetensors_of_the_same_arrays(arrays, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(safetensors.numpy.save({f"module.{name}": own for name, own in arrays.items()}))
    found = read_state_dict(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-8])
    (tmp_path / "c.safetensors").write_bytes(safetensors.numpy.save({"params.encoder.kernel": np.ones(2, np.float32)}))
    for name, sentence in (("b", "damaged archive"), ("c", "names of bsvae export")):
        with pytest.raises(UserError, match=sentence):
            read_state_dict(tmp_path / f"{name}.safetensors")


def test_other_files_are_named(arrays, tmp_path):
    path = write_state_dict(tmp_path / "model.pt", {}, "state_dict")
    with pytest.raises(UserError, match="no named tensors, but entries 'epoch', 'optimizer', 'state_dict'"):
        read_state_dict(path)
    write_state_dict(path, arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(UserError, match="TorchScript"):
        read_state_dict(path)


def test_a_workdir_in_use_is_left_alone(arrays, save, tmp_path):
    path, folder = save(arrays), tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty; imported weights need a --workdir of their own"):
        bv.import_torch(path, SMALL, folder)
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="is a file; --workdir must name a folder"):
        bv.import_torch(path, SMALL, folder / "notes.txt")
    with pytest.raises(UserError, match="cannot be written"):
        bv.import_torch(path, SMALL, "/dev/null/run")
    bv.import_torch(path, SMALL, tmp_path / "run")
    with pytest.raises(UserError, match="is not empty"):
        bv.import_torch(path, SMALL, tmp_path / "run")


@pytest.mark.long
def test_an_import_that_is_killed_leaves_no_run(arrays, save, tmp_path, monkeypatch):
    """A folder without config.json is taken for a run by no command."""

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("bsvae_jax.training.import_torch.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        bv.import_torch(save(arrays), SMALL, tmp_path / "run")
    with pytest.raises(UserError, match="is not a run"):
        bv.restore(tmp_path / "run")
    with pytest.raises(UserError, match="is not empty and not a run"):
        bv.fit(SMALL, tmp_path / "run", progress=False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["import-torch", "model.pt"], "The files come first: bsvae import-torch FILE CONFIG"),
        (["import-torch", "--beta", "1"], "The files come first"),
        (["import-torch", "model.pt", "--beta", "1"], "The files come first"),
        (["import-torch", "model.pt", "small.py", "--bata", "1"], "Perhaps you meant: --beta"),
        (["import-torch", "absent.pt", "small.py"], "absent.pt cannot be read"),
        (["import-torch", "model.pt", "smal.py"], "There is no config file smal.py"),
        (["import-torch", "model.pt", "small.py", "--network", "mlp"], "choose --network residual"),
        (["export", "nothing", "--out", "weights.safetensors"], "is not a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_commands(arguments, sentence, arrays, save, tmp_path, capsys, monkeypatch):
    save(arrays)
    (tmp_path / "small.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert sentence in " ".join((captured.err + captured.out).translate(str.maketrans("│╭╮╰╯─", "      ")).split())
    assert {entry.name for entry in tmp_path.iterdir()} <= {"model.pt", "small.py", "__pycache__"}


# --- Export -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.usefixtures("unchecked")
def test_exported_weights_make_the_same_model(imported, tmp_path, capsys):
    """Read with the library's own reader and the metadata alone; every output to the bit."""
    out = tmp_path / "exported" / "weights.safetensors"
    main.main(["export", str(imported), "--out", str(out)])
    assert str(out) in capsys.readouterr().out
    with safe_open(out, "numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file, not a dictionary)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    assert {"params.encoder.stage0_block0.conv1.kernel", "batch_stats.decoder.hidden_norm.var"} <= set(arrays)
    assert arrays["params.encoder.stage0_block0.conv1.kernel"].shape == (3, 3, 1, 8)
    assert metadata["format"] == "flax"
    assert "calibrated_variance" not in metadata

    run = bv.restore(imported)
    own = config.from_dict(json.loads(metadata["config"]))
    assert own == run.config
    shape, step = tuple(json.loads(metadata["image_shape"])), 1 / (json.loads(metadata["levels"]) - 1)
    variables = unflatten(arrays)
    assert jax.tree.structure(variables) == jax.tree.structure(run.variables)
    jax.tree.map(np.testing.assert_array_equal, variables, run.variables)
    x = jnp.linspace(0, 1, 128).reshape(2, *DIGITS)
    again = run._replace(model=build_model(own, shape, step), variables=variables)
    terms = [apply(either, x, jax.random.key(0), method="elbo_terms") for either in (run, again)]
    jax.tree.map(np.testing.assert_array_equal, *terms)


@pytest.mark.long
def test_a_trained_run_is_exported_as_it_is_evaluated(tmp_path):
    """The averaged parameters, with the calibrated variance beside them; a dense network has no batch statistics."""
    own = Config(network=MLP((6,)), latent_size=2, epochs=2, batch_size=500, devices=1, optimizer=Optimizer(ema_decay=0.5))
    bv.fit(own, tmp_path / "run", progress=False)
    run = bv.restore(tmp_path / "run")
    out = bv.export_safetensors(tmp_path / "run", tmp_path / "weights.safetensors")
    arrays = safetensors.numpy.load_file(out)
    assert set(arrays) == {f"params.{place}" for place in flatten(run.variables["params"])}
    jax.tree.map(np.testing.assert_array_equal, unflatten(arrays), {"params": run.variables["params"]})
    with safe_open(out, "numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["calibrated_variance"]) == run.calibration.variance
    assert json.loads(metadata["step"]) == run.step == 6


@pytest.mark.long
@pytest.mark.usefixtures("unchecked")
def test_wrong_places_for_an_export(imported, tmp_path, capsys):
    def refusal(*arguments):
        with pytest.raises(SystemExit) as stop:
            main.main(["export", str(imported), *map(str, arguments)])
        assert stop.value.code == 2
        return capsys.readouterr().err

    for name in ("weights.npz", "weights", "weights.safetensor"):
        assert f"must be called NAME.safetensors, got {tmp_path / name}" in refusal("--out", tmp_path / name)
    existing = tmp_path / "weights.safetensors"
    existing.write_bytes(b"precious")
    assert "exists; give another --out, or --overwrite" in refusal("--out", existing)
    assert existing.read_bytes() == b"precious"
    assert "cannot be written" in refusal("--out", "/dev/null/weights.safetensors")
    main.main(["export", str(imported), "--out", str(existing), "--overwrite"])
    assert len(safetensors.numpy.load_file(existing)) == len(flatten(bv.restore(imported).variables))
    main.main(["export", str(imported)])
    loaded = [safetensors.numpy.load_file(path) for path in (existing, imported / "weights.safetensors")]
    jax.tree.map(np.testing.assert_array_equal, *loaded)
