"""What every public function and class answers to arguments that are wrong: one sentence that says what it wants.

One table. Values of traced arrays cannot be known; shapes, types and plain numbers can, at no cost to what is compiled.
"""

import dataclasses
import decimal
import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bsvae_jax as bv
from bsvae_jax import data, theory
from bsvae_jax.config import MLP, TFDS, Arrays, Augmentation, Folder, Linear, Optimizer, Residual, StandardNormal, to_dict
from bsvae_jax.errors import UserError
from bsvae_jax.models.vae import build_vae

pytestmark = pytest.mark.usefixtures("unchecked")

NAN = float("nan")
X, MEAN, RATE = jnp.full((3, 8, 8, 1), 0.5), jnp.full((3, 8, 8, 1), 0.4), jnp.ones(3)
TERMS = bv.ElboTerms(RATE, RATE, RATE, jnp.ones(()))
EIGENVALUES = np.array([4.0, 1.0, 1.0])
CONFIG = bv.Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
MODEL = build_vae(MLP((8,)), 2, (8, 8, 1))
KEY = jax.random.key(0)
IMAGES = np.zeros((5, 8, 8, 1), np.uint8)

FITTED = bv.FittedPrior("gaussian", StandardNormal(), {}, 2, 0.0)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return bv.fit(CONFIG, tmp_path_factory.mktemp("finished") / "run", progress=False)


@pytest.fixture(scope="module")
def run(result):
    return bv.restore(result.workdir)


@pytest.fixture
def files(tmp_path, result):
    """Files and folders of the wrong kinds, by name."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    (tmp_path / "no_array.npz").write_bytes(b"PK nothing")
    (tmp_path / "no_state.pt").write_bytes(b"nothing")
    np.save(tmp_path / "floats.npy", np.full((20, 4, 4), 255.0))
    np.save(tmp_path / "vector.npy", np.zeros(20))
    np.save(tmp_path / "one.npy", np.zeros((1, 4, 4)))
    for name, content in {
        "no_function": "beta = 1",
        "no_call": "get_config = 3",
        "other": "def get_config(): return 3",
        "misspelt": "from bsvae_jax import Config\ndef get_config(): return Config(betta=1.0)",
        "negative": "from bsvae_jax import Config\ndef get_config(): return Config(beta=-1.0)",
    }.items():
        (tmp_path / f"{name}.py").write_text(content)
    return tmp_path


def make(**fields):
    return lambda: dataclasses.replace(CONFIG, **fields)


def scheduled(schedule, **fields):
    """A run of three steps with this schedule of beta."""
    return lambda: bv.fit(dataclasses.replace(CONFIG, beta_schedule=schedule, **fields), "run")


def initialized(*fields, **options):
    return lambda: build_vae(*fields, **options).init(KEY, X, KEY)


def applied(*arguments, **options):
    return lambda: MODEL.apply(MODEL.init(KEY, X, KEY), *arguments, **options)


def of_files(call):
    """A row that needs files; `call(files)` raises."""
    call.needs = "files"
    return call


def of_run(call):
    """A row that needs a finished run; `call(run)` raises."""
    call.needs = "run"
    return call


def training_state(run):
    from bsvae_jax.training.state import create_state

    return create_state(run.config, run.model, 3)


# (what is called, what with, the sentence)
ROWS = [
    # The loss
    ("gaussian_nll", lambda: bv.gaussian_nll(X, MEAN[:2], 1.0), r"one shape .* got \(3, 8, 8, 1\) and \(2, 8, 8, 1\)"),
    ("gaussian_nll", lambda: bv.gaussian_nll(X[0, 0, :, 0], MEAN[0, 0, :, 0], 1.0), r"one shape \[batch, \.\.\.pixels\]"),
    ("gaussian_nll", lambda: bv.gaussian_nll("x", MEAN, 1.0), "x must be of type .* got 'x'; give an array of floats"),
    ("gaussian_nll", lambda: bv.gaussian_nll(None, MEAN, 1.0), "x must be of type .* got None"),
    ("gaussian_nll", lambda: bv.gaussian_nll([[0.5], [0.5, 1.0]], MEAN, 1.0), "x is no array of numbers"),
    ("gaussian_nll", lambda: bv.gaussian_nll(X.astype(jnp.uint8), MEAN, 1.0), "x must be floating point .* divide 8-bit"),
    ("gaussian_nll", lambda: bv.gaussian_nll(X, MEAN, -1.0), "variance must be a finite number > 0, got -1"),
    ("gaussian_nll", lambda: bv.gaussian_nll(X, MEAN, 0), "variance must be a finite number > 0, got 0"),
    ("gaussian_nll", lambda: bv.gaussian_nll(X, MEAN, NAN), "variance must be a finite number > 0, got nan"),
    ("gaussian_nll", lambda: bv.gaussian_nll(X, MEAN, "0.5"), "variance must be a finite number > 0, got '0.5'"),
    ("gaussian_nll", lambda: bv.gaussian_nll(X, MEAN, np.array([1.0, -1.0])), "variance must be finite and > 0 everywhere"),
    ("gaussian_nll", lambda: bv.gaussian_nll(X, MEAN, jnp.ones((3, 1))), r"shape \(3, 1\) does not broadcast"),
    ("optimal_variance", lambda: bv.optimal_variance(X, MEAN[:2]), "one shape"),
    ("optimal_variance", lambda: bv.optimal_variance(X, MEAN, "image"), "'example', 'batch', 'pixel', 'channel', got 'image'"),
    ("optimal_variance", lambda: bv.optimal_variance(X, MEAN, "pixels"), r"got 'pixels' \(did you mean 'pixel'\?\)"),
    ("optimal_variance", lambda: bv.optimal_variance(X, MEAN, 3), "over must be one of"),
    ("optimal_variance", lambda: bv.optimal_variance(X, MEAN, "pixel and example"), "unbounded below"),
    ("optimal_variance", lambda: bv.optimal_variance(X, MEAN, floor=-1e-6), "floor must be a finite number >= 0"),
    ("optimal_variance", lambda: bv.optimal_variance(X, MEAN, floor=NAN), "floor must be a finite number >= 0"),
    ("optimal_variance", lambda: bv.optimal_variance(X, MEAN, "batch", axis_name="data"), "no device axis 'data' here"),
    ("optimal_gaussian_nll", lambda: bv.optimal_gaussian_nll(X, MEAN[:, :4]), "one shape"),
    ("optimal_gaussian_nll", lambda: bv.optimal_gaussian_nll(X, MEAN, "images"), "over must be one of"),
    ("optimal_gaussian_nll", lambda: bv.optimal_gaussian_nll(X, MEAN, floor="0"), "floor must be a finite number >= 0, got"),
    ("kl_to_standard_normal", lambda: bv.kl_to_standard_normal(jnp.ones((3, 2)), jnp.ones((3, 4))), "one shape, got"),
    ("kl_per_latent", lambda: bv.kl_per_latent(jnp.ones((3, 2)), jnp.ones((3, 4))), "one shape, got"),
    ("kl_gaussians", lambda: bv.kl_gaussians(jnp.ones((3, 2)), *[jnp.ones((3, 4))] * 3), "one shape, got"),
    ("kl_to_standard_normal", lambda: bv.kl_to_standard_normal("mean", jnp.ones((3, 4))), "mean must be of type"),
    ("elbo_terms", lambda: bv.elbo_terms(X, MEAN, RATE, "optimal"), "decoder_variance must be of type .* got 'optimal'"),
    ("elbo_terms", lambda: bv.elbo_terms(X, MEAN, RATE, bv.Optimal), "decoder_variance must be .* as in bsvae_jax.Optimal()"),
    ("elbo_terms", lambda: bv.elbo_terms(X, MEAN[:1], RATE, bv.Optimal()), "one shape"),
    ("elbo_terms", lambda: bv.elbo_terms(X, MEAN[:1], RATE, bv.Optimal(), mask=np.ones(X.shape, bool)), "one shape"),
    ("elbo_terms", lambda: bv.elbo_terms(X, MEAN, RATE, bv.Optimal(), mask=1.0), "mask must be a boolean array"),
    ("elbo_terms", lambda: bv.elbo_terms(X, MEAN, RATE[:2], bv.Optimal()), r"for each image, shape \(3,\), got \(2,\)"),
    ("elbo_terms", lambda: bv.elbo_terms(X, MEAN, None, bv.Optimal()), "rate must be of type .* got None"),
    ("elbo_terms", lambda: bv.elbo_terms(X, MEAN, RATE, bv.Learned()), "Learned needs log_variance, and got none"),
    ("elbo_terms", lambda: bv.elbo_terms(X, MEAN, RATE, bv.Optimal(), log_variance=jnp.ones(())), "Optimal takes no log_v"),
    ("elbo_terms", lambda: bv.elbo_terms(X, MEAN, RATE, bv.Predicted(), log_variance=jnp.ones(())), r"shape \(3, 8, 8, 1\)"),
    ("mean_objective", lambda: bv.mean_objective(TERMS, -1.0), "beta must be a finite number >= 0, got -1"),
    ("mean_objective", lambda: bv.mean_objective(TERMS, "1"), "beta must be a finite number >= 0, got '1'"),
    ("mean_objective", lambda: bv.mean_objective(TERMS, jnp.ones(3)), r"one number, got an array of shape \(3,\); jax.vmap"),
    ("mean_objective", lambda: bv.mean_objective(TERMS, 1.0, axis_name="data"), "no device axis 'data' here"),
    ("mean_over_devices", lambda: bv.mean_over_devices(jnp.ones(3), "data"), "no device axis 'data' here"),
    ("ElboTerms", lambda: bv.mean_objective(RATE, 1.0), "terms must be of type ElboTerms, got .* what elbo_terms returns"),
    ("ElboTerms", lambda: bv.mean_objective(TERMS._replace(rate=RATE[:2]), 1.0), r"got shapes \(3,\) and \(2,\)"),
    ("bits_per_dimension", lambda: bv.bits_per_dimension(1.0, ()), r"shape must be that of an image.* got \(\)"),
    ("bits_per_dimension", lambda: bv.bits_per_dimension(1.0, (28, 0, 1)), r"whole numbers >= 1 .* got \(28, 0, 1\)"),
    ("bits_per_dimension", lambda: bv.bits_per_dimension(1.0, 784), "shape must be that of an image.* got 784"),
    ("bits_per_dimension", lambda: bv.bits_per_dimension(1.0, (8, 8, 1), bin_width=0.0), "bin_width must be a finite number"),
    ("bits_per_dimension", lambda: bv.bits_per_dimension("1", (8, 8, 1)), "nll must be of type"),
    ("quantization_variance", lambda: bv.quantization_variance(-1.0), "bin_width must be a finite number > 0, got -1"),
    ("quantization_variance", lambda: bv.quantization_variance("1/255"), "bin_width must be a finite number > 0, got '1/255'"),
    ("Constant", lambda: bv.Constant(-0.5), "Constant.variance must be a finite number > 0"),
    ("Constant", lambda: bv.Constant("0.5"), "Constant.variance must be a finite number"),
    ("Constant", lambda: bv.Constant(None), "Constant.variance must be a finite number > 0, got None"),
    ("Optimal", lambda: bv.Optimal("exmaple"), r"did you mean 'example'\?"),
    ("Optimal", lambda: bv.Optimal(floor=-1.0), "Optimal.floor must be a finite number >= 0"),
    ("Learned", lambda: bv.Learned(0.0), "Learned.initial_variance must be a finite number > 0"),
    ("Learned", lambda: bv.Learned(floor=NAN), "Learned.floor must be a finite number >= 0"),
    ("Predicted", lambda: bv.Predicted(0.0), "Predicted.floor must be a finite number > 0"),
    # The model
    ("VAE", initialized("mlp", 2, (8, 8, 1)), "network must be .* derived from bsvae_jax.Network, got 'mlp'"),
    ("VAE", initialized(MLP((8,)), 0, (8, 8, 1)), "latent_size must be a whole number >= 1, got 0"),
    ("VAE", initialized(MLP((8,)), 2, (8, 8, 1), decoder_variance="optimal"), "derived from bsvae_jax.DecoderVariance"),
    ("VAE", initialized(MLP((8,)), 2, (8, 8, 1), prior="normal"), "derived from bsvae_jax.Prior, got 'normal'"),
    ("VAE", applied(X[..., 0], KEY), r"takes data of shape \(8, 8, 1\), got a batch of shape \(3, 8, 8\)"),
    ("VAE", applied(X[:, :4], KEY), r"takes data of shape \(8, 8, 1\)"),
    ("VAE", applied(X.astype(jnp.uint8), KEY), "floating-point data .* got uint8; divide 8-bit values by 255"),
    ("VAE", applied(X, 0), "key must be made by jax.random.key .* got 0"),
    ("VAE", applied(X, jax.random.PRNGKey(0)), r"key must be made by jax.random.key .* got uint32 of shape \(2,\)"),
    ("VAE", applied(X, jax.random.split(KEY, 2)), r"one for each of the 3 images, got keys of shape \(2,\)"),
    ("VAE", applied(jnp.ones((3, 5)), method="decode"), r"takes latents of shape \[B, 2\], got \(3, 5\)"),
    ("VAE", applied(KEY, 0, method="sample"), "count must be a whole number >= 1, got 0"),
    ("VAE", applied(0, 5, method="sample"), "key must be made by jax.random.key"),
    # Configs
    ("Config", make(beta=-1.0), "beta must be a finite number >= 0, got -1.0"),
    ("Config", make(beta=NAN), "beta must be a finite number >= 0, got nan"),
    ("Config", make(beta="1"), "beta must be a finite number >= 0, got '1'"),
    ("Config", make(latent_size=0), "latent_size must be a whole number >= 1, got 0"),
    ("Config", make(latent_size=2.0), "latent_size must be a whole number >= 1, got 2.0"),
    ("Config", make(epochs=-1), "epochs must be a whole number >= 1"),
    ("Config", make(batch_size=True), "batch_size must be a whole number >= 1, got True"),
    ("Config", make(evaluate_every=0), "evaluate_every must be a whole number >= 1"),
    ("Config", make(precision="float16"), r"must be one of float32, tensorfloat32, bfloat16, got 'float16' \(did you mean"),
    ("Config", make(seed=-1), "seed must be a whole number >= 0"),
    ("Config", make(seed=2**32), r"seed must be a whole number >= 0 and <= 4294967295"),
    ("Config", make(resident_memory=1.5), "resident_memory must be a finite number >= 0 and <= 1"),
    ("Config", make(devices=0), "devices must be a whole number >= 1"),
    ("Config", make(network="mlp"), "network must be an instance of a class derived from bsvae_jax.Network, got 'mlp'"),
    ("Config", make(data="digits"), "data must be .* derived from bsvae_jax.Dataset, got 'digits'"),
    ("Config", make(decoder_variance=0.5), "decoder_variance must be .* derived from bsvae_jax.DecoderVariance"),
    ("Config", make(prior=None), "prior must be .* derived from bsvae_jax.Prior, got None"),
    ("Config", make(optimizer=1e-3), "derived from bsvae_jax.Optimizer, got 0.001"),
    ("Config", make(augmentation=True), "augmentation must be of type Augmentation, got True"),
    ("Config", lambda: MLP(()), "network.hidden must be a tuple of at least one width"),
    ("Config", lambda: MLP((8, 0)), "network.hidden must be a whole number >= 1, got 0"),
    ("Config", lambda: Residual((32.0,)), "network.widths must be a whole number >= 1, got 32.0"),
    ("Config", lambda: bv.Config(optimizer=optax.sgd(1e-3)), "derived from bsvae_jax.Optimizer, got GradientTransformation"),
    ("Optimizer", lambda: Optimizer(learning_rate=NAN), "optimizer.learning_rate must be a finite number > 0"),
    ("Optimizer", lambda: Optimizer(schedule="cosin"), r"did you mean 'cosine'\?"),
    ("Optimizer", lambda: Optimizer(gradient_clip=0.0), "optimizer.gradient_clip must be a finite number > 0"),
    ("Optimizer", lambda: Optimizer(ema_decay=1.0), "optimizer.ema_decay must be a finite number >= 0 and <= 1"),
    ("Config", lambda: Augmentation(flip="no"), "augmentation.flip must be True or False, got 'no'"),
    ("Config", lambda: Augmentation(crop_scale=0.5), r"augmentation.crop_scale must be a pair \(low, high\)"),
    ("Config", lambda: Augmentation(rotation_degrees=NAN), "augmentation.rotation_degrees must be a finite number"),
    ("Config", lambda: Arrays(3), "data.path must be a path, got 3"),
    ("Config", lambda: Folder("x", holdout=0.0), "data.holdout must be a finite number > 0"),
    ("Config", lambda: Folder("x", channels=2), r"data.channels must be 1 \(gray\), 3 \(color\) or None"),
    ("Config", lambda: TFDS(data_dir=3), "data.data_dir must be a path, got 3"),
    ("Config", lambda: TFDS(train_split=""), "data.train_split must be a name, got ''"),
    ("Network", lambda: bv.Config(network=MLP), r"network .* got the class MLP; give an instance, MLP\(\.\.\.\)"),
    ("Prior", lambda: bv.Config(prior=StandardNormal), "prior .* got the class StandardNormal; give an instance"),
    ("DecoderVariance", lambda: bv.Config(decoder_variance=bv.Learned), "decoder_variance .* got the class Learned; give an"),
    ("Dataset", lambda: bv.Config(data=TFDS), "data .* got the class TFDS; give an instance"),
    ("Config", lambda: bv.config.MNIST(None), "data.folder must be a path, got None"),
    ("load_config", lambda: bv.load_config(3), "path must be of type str or PathLike, got 3"),
    ("load_config", lambda: bv.load_config("missing.py"), "There is no config file missing.py"),
    ("load_config", of_files(lambda files: bv.load_config(files / "full")), "There is no config file .*full"),
    ("load_config", of_files(lambda files: bv.load_config(files / "full" / "letter.txt")), "letter.txt is not a Python file"),
    ("load_config", of_files(lambda files: bv.load_config(files / "no_function.py")), r"no_function.py has no function get_c"),
    ("load_config", of_files(lambda files: bv.load_config(files / "no_call.py")), r"no_call.py has no function get_config\(\)"),
    ("load_config", of_files(lambda files: bv.load_config(files / "other.py")), "must return a bsvae_jax Config, got int"),
    ("load_config", of_files(lambda files: bv.load_config(files / "misspelt.py")), r"no field 'betta' \(did you mean 'beta'\?"),
    ("load_config", of_files(lambda files: bv.load_config(files / "negative.py")), "beta must be a finite number >= 0"),
    ("BetaSchedule", lambda: bv.Config(beta_schedule=bv.LinearWarmup), "got the class LinearWarmup; give an instance"),
    ("ConstantBeta", lambda: bv.Config(beta_schedule=2.0), "derived from bsvae_jax.BetaSchedule, got 2.0"),
    ("LinearWarmup", lambda: bv.LinearWarmup(0), "beta_schedule.steps must be a whole number >= 1, got 0"),
    ("LinearWarmup", scheduled(bv.LinearWarmup(3)), "steps 3 must be fewer than the 3 steps of the whole run; train for more"),
    ("LinearWarmup", scheduled(bv.LinearWarmup(2), beta=0.0), "beta_schedule linear_warmup-2 scales beta, which is 0; give a"),
    ("Cyclical", lambda: bv.Cyclical(0), "beta_schedule.steps must be a whole number >= 1, got 0"),
    ("Cyclical", lambda: bv.Cyclical(4, ramp=0.0), "beta_schedule.ramp must be a finite number > 0 and <= 1"),
    ("Cyclical", scheduled(bv.Cyclical(8)), "ends at step 3 of a cycle of 8, .* with beta_schedule.steps 3 it has arrived"),
    ("Capacity", lambda: bv.Capacity(nats=0.0), "beta_schedule.nats must be a finite number > 0, got 0"),
    ("Capacity", scheduled(bv.Capacity()), "steps 100000 must be fewer than the 3 steps .* let the capacity rise in fewer"),
    ("Capacity", scheduled(bv.Capacity(34.0, 2)), "nats 34 is more than can be carried, 33.27 nats: each latent has the bits"),
    ("TargetRate", lambda: bv.TargetRate(-1.0), "beta_schedule.nats must be a finite number >= 0, got -1"),
    ("TargetRate", lambda: bv.TargetRate(9.0, speed=2.0), r"beta_schedule.speed must be .* <= 1, got 2"),
    ("TargetRate", scheduled(bv.TargetRate()), r"target rate must be given: .* as in TargetRate\(20.0\)"),
    ("TargetRate", scheduled(bv.TargetRate(182.0), latent_size=64), "nats 182 is more than can be carried, 181.3 nats"),
    ("TargetRate", scheduled(bv.TargetRate(9.0), free_bits=bv.FreeBits(5.0)), "contradicts free_bits, which leave 10 nats"),
    ("FreeBits", lambda: bv.FreeBits(-1.0), "free_bits.nats must be a finite number >= 0, got -1"),
    ("FreeBits", lambda: bv.FreeBits(1.0, group=0), "free_bits.group must be a whole number >= 1, got 0"),
    ("FreeBits", make(free_bits=bv.FreeBits(1.0, 3)), "free_bits.group 3 does not divide the 2 latents into groups"),
    ("FreeBits", make(free_bits=bv.FreeBits(1.0), prior=bv.config.Mixture()), "free_bits.group 2, all of them, has a rate"),
    ("FreeBits", make(free_bits=1.0), "free_bits must be of type FreeBits, got 1.0"),
    ("StandardNormal", lambda: bv.StandardNormal(0), "prior.latent_size must be a whole number >= 1, got 0"),
    ("Sweep", lambda: bv.Sweep(beta=()), r"at least one beta, got \(\)"),
    ("Sweep", lambda: bv.Sweep(beta=1.0), "at least one beta, got 1.0"),
    ("Sweep", lambda: bv.Sweep(beta=(1.0, 1.0)), "beta names 1.0 twice"),
    ("Sweep", lambda: bv.Sweep(seeds=0), "seeds must be a whole number >= 1, got 0"),
    ("Sweep", lambda: bv.Sweep(decoder_variance=()), "at least one decoder_variance"),
    ("Sweep", lambda: bv.Sweep(beta_schedule=(2.0,)).members(CONFIG), "derived from bsvae_jax.BetaSchedule, got 2.0"),
    ("Sweep", lambda: bv.Sweep(beta=(-1.0,)).members(CONFIG), "beta must be a finite number >= 0, got -1.0"),
    ("Sweep", lambda: bv.Sweep(beta=("1",)).members(CONFIG), "beta must be a finite number >= 0, got '1'"),
    ("Sweep", lambda: bv.Sweep(decoder_variance=("optimal",)).members(CONFIG), "derived from bsvae_jax.DecoderVari"),
    # Training
    ("fit", lambda: bv.fit("configs/digits.py", "run"), "config must be of type Config, got .*; load_config"),
    ("fit", lambda: bv.fit(CONFIG, None), "workdir must be of type str or PathLike, got None"),
    ("fit", lambda: bv.fit(CONFIG, "gs://bucket/run"), "is a URL; --workdir must be a local folder"),
    ("fit", of_files(lambda files: bv.fit(CONFIG, files / "other.py")), "other.py is a file; --workdir must name a folder"),
    ("fit", of_files(lambda files: bv.fit(CONFIG, files / "full")), "full is not empty and not a run of bsvae"),
    ("fit", lambda: bv.fit(dataclasses.replace(CONFIG, batch_size=1501), "run"), "batch_size 1501 exceeds the 1350 training"),
    ("fit", lambda: bv.fit(dataclasses.replace(CONFIG, latent_size=65), "run"), "latent_size 65 exceeds the 64 pixels"),
    ("fit", lambda: bv.fit(dataclasses.replace(CONFIG, devices=9), "run"), r"devices must lie in 1 \.\.\. 8 .*, got 9"),
    ("fit", lambda: bv.fit(dataclasses.replace(CONFIG, devices=3), "run"), "batch_size 500 does not divide over 3 devices; 50"),
    ("fit", lambda: bv.fit(dataclasses.replace(CONFIG, data=Arrays("none.npz")), "run"), "There is no file 'none.npz'"),
    ("fit", of_run(lambda run, done: bv.fit(dataclasses.replace(CONFIG, beta=2.0), done.workdir)), "beta: 1.0 -> 2.0"),
    ("fit_sweep", lambda: bv.fit_sweep("digits", bv.Sweep(), "run"), "config must be of type Config, got 'digits'"),
    ("fit_sweep", lambda: bv.fit_sweep(CONFIG, (0.1, 1.0), "run"), r"grid must be of type Sweep, got \(0.1, 1.0\)"),
    ("fit_sweep", lambda: bv.fit_sweep(CONFIG, bv.Sweep(), 3), "workdir must be of type str or PathLike"),
    ("fit_sweep", lambda: bv.fit_sweep(CONFIG, bv.Sweep(), "run", "fast"), "execution must be one of loop, scan, vmap, got 'f"),
    ("fit_sweep", lambda: bv.fit_sweep(CONFIG, bv.Sweep(), "run", "scan", 0), "members_at_once must be a whole number >= 1"),
    ("fit_sweep", lambda: bv.fit_sweep(CONFIG, bv.Sweep(), "run", "loop", 2), "'loop' trains one member at a time"),
    ("fit_sweep", of_run(lambda run, done: bv.fit_sweep(CONFIG, bv.Sweep(), done.workdir)), "not a sweep of bsvae"),
    ("train_step", lambda: bv.train_step(CONFIG, X, KEY, 1.0), "state must be of type TrainState"),
    ("train_step", of_run(lambda run, _: bv.train_step(training_state(run), X[:, :4], KEY, 1.0)), "takes data of shape"),
    ("train_step", of_run(lambda run, _: bv.train_step(training_state(run), X, 0, 1.0)), "key must be made by jax.random.key"),
    ("train_step", of_run(lambda run, _: bv.train_step(training_state(run), X, KEY, -1.0)), "beta must be a finite number >="),
    ("train_step", of_run(lambda run, _: bv.train_step(training_state(run), X, KEY, 1.0, 0.0)), "no field 'variance' to rep"),
    ("TrainState", of_run(lambda run, _: bv.train_step(run, X, KEY, 1.0)), "state must be of type TrainState, got a value of"),
    ("failed_step", lambda: bv.failed_step(None), "workdir must be of type str or PathLike"),
    ("failed_step", lambda: bv.failed_step("nowhere"), "nowhere is not a run: it has no config.json"),
    ("failed_step", of_run(lambda run, done: bv.failed_step(done.workdir)), r"no failure.npz: no step of this run"),
    # Runs
    ("restore", lambda: bv.restore(3), "workdir must be of type str or PathLike, got 3"),
    ("restore", lambda: bv.restore("nowhere"), "nowhere is not a run"),
    ("restore", of_files(lambda files: bv.restore(files / "other.py")), "other.py is not a run"),
    ("restore", of_run(lambda run, done: bv.restore(done.workdir, "newest")), "checkpoint must be 'latest' or 'best'"),
    ("evaluate", lambda: bv.evaluate("runs/digits", None), "run must be of type Restored, got 'runs/digits'; .*restore"),
    ("evaluate", of_run(lambda run, _: bv.evaluate(run, IMAGES)), "images must be of type ImageSet"),
    ("evaluate", of_run(lambda run, done: bv.evaluate(run, done.images, "test")), r"as in \('test',\), got 'test'"),
    ("evaluate", of_run(lambda run, done: bv.evaluate(run, done.images, ())), r"names train, test and validation.* got \(\)"),
    ("evaluate", of_run(lambda run, done: bv.evaluate(run, done.images, ("tset",))), r"no split 'tset' \(did you mean 'test'"),
    ("evaluate", of_run(lambda run, done: bv.evaluate(run, done.images, samples=0)), r"must lie in 1 \.\.\. 5,000, got 0"),
    ("evaluate", of_run(lambda run, done: bv.evaluate(run, done.images, samples="5")), r"must lie in 1 \.\.\. 5,000, got '5'"),
    ("evaluate", of_run(lambda run, done: bv.evaluate(run, done.images, bound_images=0)), "needs at least one image, got 0"),
    (
        "evaluate",
        of_run(lambda run, done: bv.evaluate(run, done.images, posterior_samples=0)),
        "posterior_samples must be a whole number >= 1",
    ),
    ("evaluate", of_run(lambda run, done: bv.evaluate(run, done.images, fid_options=50)), "fid_options must be of type Fid"),
    ("evaluate", of_run(lambda run, done: bv.evaluate(run, done.images, workdir="nowhere")), "There is no folder nowhere"),
    ("evaluate", of_run(lambda run, _: bv.evaluate(run, data.ImageSet("x", IMAGES[:, :4], IMAGES[:, :4]))), "the data have"),
    ("Restored", of_run(lambda run, done: bv.evaluate(run.model, done.images)), "run must be of type Restored"),
    ("FitResult", of_run(lambda run, done: bv.evaluate(done, done.images)), "run must be of type Restored"),
    ("FailedStep", of_run(lambda run, _: bv.train_step(*bv.FailedStep(run.variables, X, KEY, jnp.ones(()), None))), "TrainSta"),
    ("SweepResult", lambda: bv.restore(bv.SweepResult(Path("x"), [], {})), "workdir must be of type str or PathLike, got Swee"),
    ("Imported", lambda: bv.restore(bv.Imported(Path("x"), 1, "")), "workdir must be of type str or PathLike, got Imported"),
    ("Callback", lambda: bv.fit(CONFIG, "run", callbacks=[bv.Callback]), "not the class"),
    ("EarlyStopping", lambda: bv.EarlyStopping(0), "patience must be a whole number >= 1, got 0"),
    ("EarlyStopping", lambda: bv.EarlyStopping(1, term="loss"), "term must be one of objective, .* got 'loss'"),
    ("WandbTracker", lambda: bv.fit(CONFIG, "run", callbacks=[bv.WandbTracker]), "not the class"),
    ("read_results", lambda: bv.read_results(3), "folder must be of type str or PathLike, got 3"),
    ("read_results", lambda: bv.read_results("nowhere"), "nowhere is not a sweep"),
    ("write_report", lambda: bv.write_report(None), "folder must be of type str or PathLike, got None"),
    ("write_report", of_run(lambda run, done: bv.write_report(done.workdir)), "is not a sweep: it has no sweep.json"),
    ("Fid", lambda: bv.Fid(3), "FID needs samples, at least 4, got 3"),
    ("Fid", lambda: bv.Fid("many"), "FID needs samples, at least 4, got 'many'"),
    ("Fid", lambda: bv.Fid(protocol="papers"), "protocol must be 'standard' or 'paper', got 'papers'"),
    ("Fid", lambda: bv.Fid(weights="inception.pth"), "weights must be of type Weights, .*; inception.load_weights"),
    ("list_runs", lambda: bv.list_runs("nowhere"), "There is no folder nowhere"),
    ("compare_runs", lambda: bv.compare_runs(["nowhere"]), "at least two different runs, got 1"),
    ("compare_runs", lambda: bv.compare_runs(["nowhere", "neither"]), "nowhere is not a run"),
    ("compare_runs", lambda: bv.compare_runs([3, 4]), "folder must be of type str or PathLike, got 3"),
    ("export_hub", lambda: bv.export_hub("nowhere", "model"), "nowhere is not a run"),
    ("export_hub", lambda: bv.export_hub("run", "model", license="MIT License"), "apache-2.0 or mit for example, got 'MIT"),
    ("export_safetensors", lambda: bv.export_safetensors("run", "weights.npz"), "NAME.safetensors, got weights.npz"),
    ("export_stablehlo", lambda: bv.export_stablehlo("nowhere", "programs"), "nowhere is not a run"),
    ("export_stablehlo", lambda: bv.export_stablehlo("run", None), "out must be of type str or PathLike"),
    ("export_safetensors", lambda: bv.export_safetensors("run", None), "out must be of type str or PathLike"),
    ("FittedPrior", lambda: FITTED.log_prob(np.zeros((3, 5))), r"z must have shape \[N, 2\], got \(3, 5\)"),
    ("FittedPrior", lambda: FITTED.sample(KEY, 0), "count must be a whole number >= 1, got 0"),
    ("fit_prior", lambda: bv.fit_prior(3), "workdir must be of type str or PathLike"),
    ("fit_prior", lambda: bv.fit_prior("nowhere"), "nowhere is not a run"),
    ("fit_prior", lambda: bv.fit_prior("run", "gauss"), r"kind must be one of .*got 'gauss' \(did you mean 'gaussian'"),
    ("fit_prior", lambda: bv.fit_prior("run", None), "kind must be one of gaussian, mixture, flow, flow_matching, got None"),
    ("fit_prior", lambda: bv.fit_prior("run", components=0), "components must be a whole number >= 1, got 0"),
    ("fit_prior", lambda: bv.fit_prior("run", components=2.5), "components must be a whole number >= 1, got 2.5"),
    ("fit_prior", lambda: bv.fit_prior("run", seed=-1), r"seed must be a whole number >= 0, got -1"),
    ("fit_prior", lambda: bv.fit_prior("run", seed="one"), r"seed must be a whole number >= 0, got 'one'"),
    ("export_safetensors", lambda: bv.export_safetensors("nowhere", "w.safetensors"), "nowhere is not a run"),
    ("import_torch", lambda: bv.import_torch(3, CONFIG, "run"), "path must be of type str or PathLike"),
    ("import_torch", lambda: bv.import_torch("missing.pt", CONFIG, "run"), r"missing.pt cannot be read \(No such file"),
    ("import_torch", lambda: bv.import_torch("missing.pt", "mnist", "run"), "config must be of type Config, got 'mnist'"),
    ("import_torch", of_files(lambda files: bv.import_torch(files / "no_state.pt", CONFIG, "run")), "no_state.pt"),
    ("import_torch", of_files(lambda files: bv.import_torch(files / "full", CONFIG, "run")), "full cannot be read"),
    # Theory
    ("theory.linear_optimum", lambda: theory.linear_optimum("x", 1, 1.0), "eigenvalues must be a vector of numbers"),
    ("theory.linear_optimum", lambda: theory.linear_optimum(np.ones((2, 2)), 1, 1.0), r"non-empty vector, got shape \(2, 2\)"),
    ("theory.linear_optimum", lambda: theory.linear_optimum(np.ones(0), 1, 1.0), r"non-empty vector, got shape \(0,\)"),
    ("theory.linear_optimum", lambda: theory.linear_optimum(np.array([1.0, NAN]), 1, 1.0), "eigenvalues must be finite"),
    ("theory.linear_optimum", lambda: theory.linear_optimum(np.array([1.0, -1.0]), 1, 1.0), "eigenvalues of a covariance are"),
    ("theory.linear_optimum", lambda: theory.linear_optimum(EIGENVALUES, 0, 1.0), r"latent_size must lie in 1 \.\.\. 3"),
    ("theory.linear_optimum", lambda: theory.linear_optimum(EIGENVALUES, 1.5, 1.0), r"latent_size must lie in 1 \.\.\. 3"),
    ("theory.linear_optimum", lambda: theory.linear_optimum(EIGENVALUES, 1, 0.0), "beta must be a finite number > 0, got 0.0"),
    ("theory.linear_optimum", lambda: theory.linear_optimum(EIGENVALUES, 1, "1x"), "beta must be a finite number > 0, got '1x"),
    ("theory.linear_optimum", lambda: theory.linear_optimum(EIGENVALUES, 1, 1.0, NAN), "floor must be a finite number >= 0"),
    ("theory.critical_beta", lambda: theory.critical_beta(np.zeros(3)), "The data have no variance"),
    ("theory.critical_beta", lambda: theory.critical_beta(EIGENVALUES, -1.0), "floor must be a finite number >= 0, got -1.0"),
    ("theory.gaussian_rate_distortion", lambda: theory.gaussian_rate_distortion(EIGENVALUES, 0.0), "a finite number > 0, got"),
    ("theory.gaussian_rate_distortion", lambda: theory.gaussian_rate_distortion(EIGENVALUES, NAN), "distortion must be"),
    ("theory.gaussian_rate_distortion", lambda: theory.gaussian_rate_distortion(EIGENVALUES, None), "distortion must be"),
    ("theory.probabilistic_pca_log_likelihood", lambda: theory.probabilistic_pca_log_likelihood(EIGENVALUES, 3), r"1 \.\.\. 2"),
    ("theory.probabilistic_pca_log_likelihood", lambda: theory.probabilistic_pca_log_likelihood("x", 1), "eigenvalues must be"),
    ("theory.covariance_eigenvalues", lambda: theory.covariance_eigenvalues(np.ones((1, 3))), "at least 2 examples, got 1"),
    ("theory.covariance_eigenvalues", lambda: theory.covariance_eigenvalues(np.ones(3)), r"shape \[examples, \.\.\.\], got"),
    ("theory.covariance_eigenvalues", lambda: theory.covariance_eigenvalues("data"), "data must be numbers of shape"),
    ("theory.covariance_eigenvalues", lambda: theory.covariance_eigenvalues(np.array([[1.0], [NAN]])), "data must be finite"),
    # Data
    ("read_metrics", lambda: bv.read_metrics(3), "folder must be of type str or PathLike, got 3"),
    ("data.MNIST", lambda: data.MNIST(3), "data.folder must be a path, got 3"),
    ("data.TFDS", lambda: data.TFDS(""), "data.name must be a name, got ''"),
    ("data.Arrays", lambda: data.Arrays(levels=1), "data.levels must be a whole number >= 2, got 1"),
    ("data.Folder", lambda: data.Folder(size=0), "data.size must be a whole number >= 1, got 0"),
    ("data.load", lambda: data.load("digits"), "source must be .* derived from bsvae_jax.Dataset, got 'digits'"),
    ("data.load", lambda: data.load(bv.config.Digits), "source must be .* derived from bsvae_jax.Dataset"),
    ("data.load", lambda: data.load(Arrays()), r"There is no file '.'; data.path must name a .npz or .npy"),
    ("data.load", lambda: data.load(Arrays("none.npz")), "There is no file 'none.npz'"),
    ("data.load", of_files(lambda files: data.load(Arrays(files / "no_array.npz"))), "cannot be read as a NumPy file"),
    ("data.load", of_files(lambda files: data.load(Arrays(files / "floats.npy"))), r"must lie in \[0, 1\], got values from 2"),
    ("data.load", of_files(lambda files: data.load(Arrays(files / "vector.npy"))), r"\[N, H, W\] or \[N, H, W, C\], got \(20"),
    ("data.load", of_files(lambda files: data.load(Arrays(files / "one.npy"))), "1 images: too few to keep 1 for testing"),
    ("data.load", of_files(lambda files: data.load(Folder(files / "empty"))), "empty holds no images"),
    ("data.load", of_files(lambda files: data.load(Folder(files / "full"))), "holds 1 other files, 'letter.txt' first"),
    ("data.load", lambda: data.load(Folder("nowhere")), "There is no folder or file 'nowhere'"),
    ("data.load", lambda: data.load(bv.config.MNIST("nowhere")), "nowhere lacks train-images-idx3-ubyte.gz"),
    ("data.load", of_files(lambda files: data.load(TFDS("no_such", data_dir=files))), "TFDS has no set 'no_such'"),
    ("data.prepare", lambda: data.prepare(3, "folder"), "train must be an iterable of images, got a value of type int"),
    ("prepare", lambda: bv.prepare(IMAGES, 4), "folder must be of type str or PathLike, got 4"),
    ("data.shape_of", lambda: data.shape_of("digits"), "source must be .* derived from bsvae_jax.Dataset, got 'digits'"),
    ("data.shape_of", lambda: data.shape_of(bv.config.Digits(), (8, 0)), r"height, width and channels, .* got \(8, 0\)"),
    ("data.shape_of", lambda: data.shape_of(bv.config.Digits(), images=5), "A number of images is for an image shape"),
    ("data.DataShape", lambda: data.load(data.DataShape((8, 8, 1), 17, np.uint8, 5, 1)), "derived from bsvae_jax.Dataset"),
    ("data.ImageSet", lambda: data.ImageSet("x", IMAGES.tolist(), IMAGES), "train must be of type ndarray.*check_images"),
    ("data.ImageSet", lambda: data.ImageSet("x", IMAGES, IMAGES[:0]), r"test must hold examples .* got shape \(0, 8, 8, 1\)"),
    ("data.ImageSet", lambda: data.ImageSet("x", IMAGES[..., 0], IMAGES), "train and test must be images of one kind"),
    ("data.ImageSet", lambda: data.ImageSet("x", IMAGES, IMAGES.astype(np.float64)), "test must be uint8 or float32"),
    ("data.ImageSet", lambda: data.ImageSet("x", IMAGES, IMAGES[:, :4]), "must be images of one kind"),
    ("data.ImageSet", lambda: data.ImageSet("x", IMAGES, IMAGES, levels=1), "levels must be a whole number >= 2, got 1"),
    ("data.check_images", lambda: data.check_images(np.ones(3), "mine"), r"mine must have shape .*, got \(3,\)"),
    ("data.check_images", lambda: data.check_images(IMAGES[:0], "mine"), "mine is empty"),
    ("data.check_images", lambda: data.check_images(np.full((2, 4, 4), NAN), "mine"), "mine holds NaN"),
    ("data.check_images", lambda: data.check_images(np.full((2, 4, 4), -1.0), "mine"), r"must lie in \[0, 1\]"),
    ("data.check_images", lambda: data.check_images([[1.0], [1.0, 2.0]], "mine"), "mine must be one array"),
    ("data.check_images", lambda: data.check_images(IMAGES.astype(int), "mine"), "must be uint8 .* got dtype int64"),
    ("data.ShuffledOrder", lambda: data.ShuffledOrder(0, 3, 2), "key must be made by jax.random.key"),
    ("data.ShuffledOrder", lambda: data.ShuffledOrder(KEY, 0, 2), "examples must be a whole number >= 1, got 0"),
    ("data.ShuffledOrder", lambda: data.ShuffledOrder(KEY, 3, 2.0), "batch_size must be a whole number >= 1, got 2.0"),
    ("data.Dataset", lambda: data.load(data.Dataset), "source .* got the class Dataset; give an instance"),
    ("data.Augmentation", lambda: data.Augmentation(flip=1), "augmentation.flip must be True or False, got 1"),
    ("data.augment", lambda: data.augment(X, KEY, Augmentation(flip=True)), "keys must be one for each of the 3 images"),
    ("data.augment", lambda: data.augment(X, jax.random.split(KEY, 2), Augmentation(flip=True)), "each of the 3 images"),
    ("data.augment", lambda: data.augment(X[0], KEY, Augmentation(flip=True)), r"shape \[B, H, W, C\], got float32 of shape"),
    ("data.augment", lambda: data.augment(X, KEY, {"flip": True}), "config must be of type Augmentation"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "telling"), [row[1:] for row in ROWS], ids=[f"{i}-{row[0]}" for i, row in enumerate(ROWS)])
def test_a_wrong_argument_is_answered_in_a_sentence(call, telling, request, tmp_path, monkeypatch):
    needs = getattr(call, "needs", None)
    arguments = [request.getfixturevalue(name) for name in {"files": ("files",), "run": ("run", "result")}.get(needs, ())]
    monkeypatch.chdir(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        call(*arguments)
    sentence = str(error.value)
    assert re.search(telling, sentence), sentence
    assert "\n" not in sentence
    assert len(sentence) < 500, sentence
    assert sorted(tmp_path.rglob("*")) == there, "something was written"


WRONG_KINDS = {
    "text": "x",
    "bytes": b"x",
    "decimal": decimal.Decimal("0.5"),
    "too large": 10**400,
    "too long to write": -(10**5000),
    "list": [1.0, 2.0],
    "vector": np.ones(5),
    "vector of JAX": jnp.ones(5),
    "key": KEY,
    "float8": jnp.ones((3, 8, 8, 1), jnp.float8_e4m3fn),
    "objects": np.ones((3, 8, 8, 1), object),
    "complex": 1j,
    "dictionary": {},
    "terms": TERMS,
    "class": bv.Optimal,
}
"""None of them is a number, and none an array of floats of the shapes that are wanted."""
OF_NUMBERS = {
    "gaussian_nll": (bv.gaussian_nll, (X, MEAN, 1.0)),
    "optimal_variance": (bv.optimal_variance, (X, MEAN, "batch", 0.0, None)),
    "optimal_gaussian_nll": (bv.optimal_gaussian_nll, (X, MEAN, "batch", 0.0, None)),
    "kl_gaussians": (bv.kl_gaussians, (jnp.ones((3, 2)),) * 4),
    "kl_per_latent": (bv.kl_per_latent, (jnp.ones((3, 2)),) * 2),
    "elbo_terms": (bv.elbo_terms, (X, MEAN, RATE, bv.Optimal())),
    "mean_objective": (lambda *values: bv.mean_objective(TERMS, *values), (1.0, None)),
    "distortion": (lambda value: bv.mean_objective(TERMS._replace(distortion=value), 1.0), (RATE,)),
    "rate": (lambda value: bv.mean_objective(TERMS._replace(rate=value), 1.0), (RATE,)),
    "bits_per_dimension": (lambda *values: bv.bits_per_dimension(1.0, *values), ((8, 8, 1), 0.1)),
    "quantization_variance": (bv.quantization_variance, (0.1,)),
    "Constant": (bv.Constant, (1.0,)),
    "Optimal": (bv.Optimal, ("example", 0.0)),
    "Learned": (bv.Learned, (1.0, 0.0)),
    "StandardNormal": (bv.StandardNormal, (1,)),
    "EarlyStopping": (bv.EarlyStopping, (3, 0.0, "objective")),
    "Optimizer": (Optimizer, (1e-3, 1e-5, "cosine", 2, 0, 1.0, 0.5, 0)),
    "Arrays": (lambda *values: Arrays("x", *values), (0.1, 0, 256)),
    "Folder": (lambda *values: Folder("x", *values), (0.1, 0, 8, 8, 1)),
    "linear_optimum": (lambda *values: theory.linear_optimum(EIGENVALUES, *values), (1, 1.0, 0.0)),
    **{
        name: (lambda value, name=name: dataclasses.replace(CONFIG, **{name: value}), (1,))
        for name in ("beta", "latent_size", "epochs", "batch_size", "devices", "resident_memory", "seed", "precision")
    },
}


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_a_wrong_kind_of_number_is_answered_in_a_sentence(name):
    call, right = OF_NUMBERS[name]
    if name not in ("precision",):
        call(*right)
    for place in range(len(right)):
        for kind, wrong in WRONG_KINDS.items():
            arguments = (*right[:place], wrong, *right[place + 1 :])
            if (name, place, kind) == ("gaussian_nll", 2, "float8"):  # a variance of each pixel
                continue
            with pytest.raises(UserError) as error:
                call(*arguments)
            assert "\n" not in str(error.value), kind
            assert len(str(error.value)) < 600, kind


def test_a_wrong_argument_is_a_value_error():
    """As NumPy and JAX raise it: code written for them catches it."""
    with pytest.raises(ValueError, match="beta must be a finite number"):
        bv.Config(beta=-1.0)
    assert issubclass(bv.UserError, bv.BsvaeError)


def test_every_public_name_has_a_row():
    called = {row[0] for row in ROWS}
    public = {name: getattr(bv, name) for name in bv.__all__}
    public |= {f"data.{name}": getattr(data, name) for name in data.__all__}
    public |= {
        f"theory.{n}": v
        for n, v in vars(theory).items()
        if inspect.isfunction(v) and v.__module__ == theory.__name__ and n[0] != "_"
    }
    wanted = {
        name
        for name, value in public.items()
        if callable(value) and not (inspect.isclass(value) and issubclass(value, BaseException))
    }
    wanted -= {"data.Digits", "data.to_unit_interval"}  # without arguments; inside of compiled functions only
    assert {"fit", "VAE", "theory.linear_optimum", "data.load"} <= wanted
    assert sorted(called) == sorted(wanted)


@pytest.mark.parametrize(
    "make",
    [np.float32, np.float64, np.float16, jnp.float32, np.array, jnp.asarray],
    ids=["float32", "float64", "float16", "jax float32", "array", "jax array"],
)
def test_numbers_of_numpy_and_jax_are_numbers(make):
    whole = np.int64 if make in (np.float32, np.float64, np.float16) else jnp.int32 if make is jnp.float32 else make
    optimizer = Optimizer(learning_rate=make(0.5), cycles=whole(3))
    fields = dict(network=MLP((whole(8),)), latent_size=whole(2), optimizer=optimizer, decoder_variance=bv.Constant(make(0.25)))
    config = bv.Config(beta=make(0.5), seed=whole(7), augmentation=Augmentation(crop_scale=(make(0.5), 1.0)), **fields)
    plain = bv.Config(
        beta=0.5,
        seed=7,
        augmentation=Augmentation(crop_scale=(0.5, 1.0)),
        network=MLP((8,)),
        latent_size=2,
        optimizer=Optimizer(learning_rate=0.5, cycles=3),
        decoder_variance=bv.Constant(0.25),
    )
    assert config == plain
    assert json.dumps(to_dict(config)) == json.dumps(to_dict(plain))
    assert hash(config) == hash(plain)


@pytest.mark.long
def test_right_arguments_pass(tmp_path):
    """The checks are no stricter than the documentation: lists, NumPy's arrays and numbers, traced arrays, paths as paths."""
    x = [[0.0, 1.0]]
    assert bv.gaussian_nll(x, np.zeros((1, 2)), np.float32(0.5)).shape == (1,)
    assert bv.gaussian_nll(x, jnp.zeros((1, 2)), np.array([0.5, 1.0])).shape == (1,)
    jax.jit(bv.gaussian_nll)(X, MEAN, -1.0)  # traced: nobody can know
    jax.vmap(lambda beta: bv.mean_objective(TERMS, beta))(jnp.ones(3))
    jax.grad(bv.quantization_variance)(0.5)
    assert theory.linear_optimum([4.0, 1.0, 1.0], np.int64(1), np.float32(1.0)).active == 1
    assert Arrays(tmp_path / "x.npz") == Arrays(str(tmp_path / "x.npz"))
    assert Folder(tmp_path) == Folder(str(tmp_path))
    assert isinstance(bv.Config(network=Linear()).network, Linear)
    MODEL.apply(MODEL.init(KEY, X, KEY), X, jax.random.split(KEY, 3))
