"""Ailments are named where they are and only there; theory's critical beta by NumPy's eigenvalues."""

import json
import re

import jax
import numpy as np
import pytest

import bsvae_jax as bv
from bsvae_jax import data
from bsvae_jax.config import MLP, Config, Digits, Linear
from bsvae_jax.distributed import mesh
from bsvae_jax.evaluation.diagnosis import diagnose
from bsvae_jax.evaluation.scores import SplitScores
from bsvae_jax.objective import Constant, Learned, Optimal

IMAGES = data.load(Config().data)
VARIANCE = (IMAGES.test / 16.0).var(axis=0).mean()


def scores(mse=0.01, rate=20.0, active=True, variance=0.01):
    count = 40
    means = np.random.default_rng(0).normal(size=(count, 3)) * (1.0 if active else 1e-3)
    return SplitScores(
        squared_error=np.full(count, mse * 64),
        rate=np.full(count, rate),
        pixel_squared_error=np.full((8, 8, 1), mse),
        posterior_mean=means,
        latent_rate=np.full(3, rate / 3),
        model_distortion=np.zeros(count),
        model_variance=variance,
        scaled_error=np.zeros(count),
    )


def test_a_healthy_model_has_no_ailment():
    assert diagnose(scores(), Config(), IMAGES) == {}


def test_variance_collapse():
    floor = 1 / (12 * 16**2)
    assert list(diagnose(scores(variance=1.5 * floor), Config(), IMAGES)) == ["variance collapse"]
    assert diagnose(scores(variance=2.5 * floor), Config(), IMAGES) == {}
    # A constant variance is a choice, not a collapse.
    assert diagnose(scores(variance=1e-6), Config(decoder_variance=Constant(1e-6)), IMAGES) == {}


@pytest.mark.parametrize(("variance", "converged"), [(0.461, False), (0.0205, True), (0.006, True), (0.002, False)])
@pytest.mark.parametrize("active", [True, False])
def test_a_trained_variance_far_from_the_squared_error_is_no_posterior_collapse(variance, converged, active):
    config = Config(decoder_variance=Learned())
    expected = ["variance not converged"] if not converged else [] if active else ["posterior collapse"]
    assert list(diagnose(scores(mse=0.0120, variance=variance, active=active), config, IMAGES)) == expected
    assert "variance not converged" not in diagnose(scores(mse=0.0120, variance=variance), Config(), IMAGES)


@pytest.mark.parametrize("variance_model", [Constant(0.5), Optimal("batch")])
def test_posterior_collapse_and_the_critical_beta(variance_model):
    flat = (IMAGES.train / 16.0).reshape(len(IMAGES.train), -1)
    eigenvalues = np.linalg.eigvalsh(np.cov(flat, rowvar=False, ddof=0))
    level = 0.5 if isinstance(variance_model, Constant) else eigenvalues.mean() + 1 / (12 * 16**2)
    config = Config(decoder_variance=variance_model, network=Linear(), beta=30.0)
    found = diagnose(scores(active=False, rate=0.01), config, IMAGES)
    assert list(found) == ["posterior collapse"]
    quoted = float(re.search(r"this linear model collapses beyond beta = ([\d.]+)", found["posterior collapse"])[1])
    assert quoted == pytest.approx(eigenvalues[-1] / level, rel=1e-3)


def test_no_critical_beta_of_a_variance_per_image():
    """It is another: of one latent on the digits 13.3 where one variance for all collapses at 9.4 (exact objectives)."""
    found = diagnose(scores(active=False, rate=0.01), Config(network=Linear(), beta=30.0), IMAGES)
    assert "in theory" not in found["posterior collapse"]


def test_dead_decoder():
    assert list(diagnose(scores(mse=VARIANCE), Config(), IMAGES)) == ["dead decoder"]
    assert diagnose(scores(mse=0.9 * VARIANCE), Config(), IMAGES) == {}


@pytest.mark.long
def test_a_collapsed_run_says_so_in_its_log_and_its_evaluation(tmp_path, caplog):
    config = Config(
        data=Digits(validation=None),
        network=MLP((16,)),
        latent_size=4,
        decoder_variance=Optimal("batch"),
        beta=1000.0,
        epochs=40,
        evaluate_every=20,
        batch_size=500,
        devices=1,
    )
    bv.fit(config, tmp_path / "run", progress=False)
    errors = caplog.text
    assert errors.count("posterior collapse after step") == 1
    findings = json.loads((tmp_path / "run" / "evaluation.json").read_text())["findings"]
    assert list(findings) == ["posterior collapse"]
    assert "this run has 1000" in findings["posterior collapse"]


def test_an_accelerator_that_is_not_used_is_named(monkeypatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    assert "WARNING" not in mesh.describe_devices(mesh.data_mesh(1)), "these tests ask for a CPU"
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        assert "has a TPU that JAX does not use" in mesh.describe_devices(mesh.data_mesh(1))
        monkeypatch.delenv("TPU_ACCELERATOR_TYPE")
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("cuda", "remedy"),
    [
        (None, r"does not use: pip install 'jax\[cuda13\]'$"),
        (12, "driver may be older than CUDA 12 needs .525.; nvidia-smi names it. Update it$"),
        (13, r"driver may be older than CUDA 13 needs .580.; nvidia-smi names it. Update it, or .*'jax\[cuda12\]'$"),
    ],
)
def test_an_unused_gpu_is_said_to_lack_cuda_or_a_new_driver(monkeypatch, cuda, remedy):
    monkeypatch.setattr(mesh.Path, "exists", lambda path: str(path) == "/proc/driver/nvidia/version")
    monkeypatch.setattr(mesh.importlib.util, "find_spec", lambda name: f"jax_cuda{cuda}_plugin" == name or None)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        assert re.search(remedy, mesh.unused_accelerator())
    finally:
        jax.config.update("jax_platforms", before)
