"""Densities fitted after training: against the entropy of known ones; then `bsvae fit-prior` and what uses its result."""

import dataclasses
import json
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import main, refused
from PIL import Image
from scipy import stats

import bsvae_jax as bv
from bsvae_jax import config as configs
from bsvae_jax import data
from bsvae_jax.config import MLP, Config, Digits, Flow, Linear, Mixture, Optimizer
from bsvae_jax.distributed.mesh import data_mesh
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation import evaluate
from bsvae_jax.objective import Optimal
from bsvae_jax.training import fit_prior as stage
from bsvae_jax.training import fitted_prior
from bsvae_jax.training.evaluated import read_evaluation, write_evaluation
from bsvae_jax.training.fit import fit
from bsvae_jax.training.fit_prior import fit_prior
from bsvae_jax.training.fitted_prior import FITTED_HERE, fit_density, read_fitted, write_fitted
from bsvae_jax.training.restore import restore
from bsvae_jax.training.trainer import Trainer

MANY = 20_000
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind == "flow" else ()) for kind in FITTED_HERE]


# --- Known densities --------------------------------------------------------------------------------------------------

COVARIANCE = np.array([[4.0, 1.2, 0.0], [1.2, 1.0, -0.3], [0.0, -0.3, 0.25]])
GAUSSIAN = stats.multivariate_normal([1.0, -20.0, 0.0], COVARIANCE)
MODES = [stats.multivariate_normal(mean, COVARIANCE / 4) for mean in ([3.0, 0.0, 0.0], [-3.0, 0.0, 1.0], [0.0, 3.0, -1.0])]
WEIGHTS = [0.5, 0.3, 0.2]


def gaussian(seed):
    return GAUSSIAN.rvs(MANY, random_state=seed), GAUSSIAN.logpdf


def modes(seed):
    which = np.random.default_rng(seed).choice(3, MANY, p=WEIGHTS)
    z = np.stack([mode.rvs(MANY, random_state=seed + 1 + i) for i, mode in enumerate(MODES)])[which, np.arange(MANY)]
    return z, lambda z: np.log(sum(w * mode.pdf(z) for w, mode in zip(WEIGHTS, MODES, strict=True)))


def banana(seed):
    """Density known by the change of variables (u, v) -> (2u, v + u^2): log N(u, v; 0, I/4 for v) - log 2."""
    generator = np.random.default_rng(seed)
    u, v = generator.normal(size=MANY), 0.5 * generator.normal(size=MANY)
    return np.column_stack(
        [2 * u, v + u**2]
    ), lambda z: stats.norm.logpdf(z[:, 0] / 2) - np.log(2) + stats.norm.logpdf(z[:, 1] - (z[:, 0] / 2) ** 2, 0, 0.5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "truth", "loss"),
    [
        # A fit of p parameters to n samples loses p / (2 n) nats: 9 and 29 over 40,000, below a thousandth of a nat.
        ("gaussian", gaussian, 0.003),
        ("mixture", modes, 0.003),
        # No flow has the density exactly: within a twentieth of a nat of it, where a Gaussian is 0.6 and more away.
        pytest.param("flow", gaussian, 0.02, marks=pytest.mark.slow),
        ("flow", banana, 0.05),
        pytest.param("flow", modes, 0.1, marks=pytest.mark.slow),
    ],
)
def test_a_known_density_is_recovered(kind, truth, loss):
    (train, exact), (other, _) = truth(0), truth(100)
    fitted = fit_density(kind, train, other, jax.random.key(0), 3)
    fresh, _ = truth(200)
    gap = exact(fresh) - fitted.log_prob(fresh)  # its mean is KL(truth || fitted), whatever the entropy
    error = gap.std() / np.sqrt(MANY)
    assert -4 * error < gap.mean() < loss + 4 * error
    assert -fitted.log_prob(fresh).mean() == pytest.approx(-exact(fresh).mean(), abs=loss + 4 * error)  # the entropy
    assert fitted.held_out == pytest.approx(fitted.log_prob(other).mean())
    # Samples have the density too: the mean log density of both, 5 standard errors.
    drawn = np.asarray(fitted.sample(jax.random.key(1), MANY), np.float64)
    one, two = fitted.log_prob(drawn), fitted.log_prob(fresh)
    tolerance = 5 * np.sqrt((one.var() + two.var()) / MANY) + loss * 3
    assert abs(one.mean() - two.mean()) < tolerance
    assert np.all(np.abs(drawn.mean(axis=0) - fresh.mean(axis=0)) < 0.15 * fresh.std(axis=0))


def test_a_gaussian_is_the_mean_and_covariance():
    z, _ = gaussian(0)
    fitted = fit_density("gaussian", z, z, jax.random.key(0))
    expected = stats.multivariate_normal(z.mean(axis=0), np.cov(z.T, bias=True)).logpdf(z[:500])
    np.testing.assert_allclose(fitted.log_prob(z[:500]), expected, atol=2e-3)  # float32, a mean of -20


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_of_latents_does_not_matter(kind):
    """Latents a thousand times smaller: the same density, 3 log 1000 nats higher. A flow's training rounds
    differently from the first step on and ends in another optimum, some tenths of a nat away."""
    (train, _), (other, _) = modes(0), modes(100)
    one, small = (fit_density(kind, s * train[:5000], s * other[:5000], jax.random.key(0), 3) for s in (1.0, 1e-3))
    assert small.held_out - one.held_out == pytest.approx(3 * np.log(1000), abs=0.6 if kind == "flow" else 0.02)


@pytest.mark.long
def test_latents_that_do_not_vary():
    z = np.random.default_rng(0).normal(size=(1000, 3)) * np.array([1.0, 1e-3, 1.0])
    z[:, 2] = z[:, 0]
    for kind in FITTED_HERE:
        fitted = fit_density(kind, z, z, jax.random.key(0), 2)
        assert np.isfinite(fitted.held_out)
        assert np.isfinite(fitted.sample(jax.random.key(0), 10)).all()


@pytest.mark.parametrize(
    ("kind", "components", "sentence"),
    [
        ("gauss", 1, r"kind must be one of gaussian, mixture, flow, flow_matching, got 'gauss' \(did you mean 'gaussian'\?\)"),
        ("mixture", 0, "components must be a whole number >= 1, got 0"),
        ("mixture", True, "components must be a whole number >= 1, got True"),
        ("mixture", 11, "components 11 exceeds the 10 latents to fit them to"),
    ],
)
def test_what_cannot_be_fitted(kind, components, sentence):
    z = np.random.default_rng(0).normal(size=(10, 2))
    with pytest.raises(UserError, match=sentence):
        fit_density(kind, z, z, jax.random.key(0), components)


@pytest.mark.long
@pytest.mark.parametrize("kind", FITTED_HERE)
def test_the_file_keeps_all_of_it(kind, tmp_path):
    z = np.random.default_rng(0).normal(size=(600, 3))
    fitted = dataclasses.replace(fit_density(kind, z, z, jax.random.key(0), 2), checkpoint="ab" * 32, step=7, seed=3)
    write_fitted(tmp_path, fitted)
    back = read_fitted(tmp_path)
    for field in ("kind", "prior", "latent_size", "held_out", "held_out_before", "checkpoint", "step", "seed"):
        assert getattr(back, field) == getattr(fitted, field), field
    np.testing.assert_array_equal(back.log_prob(z), fitted.log_prob(z))
    with zipfile.ZipFile(tmp_path / "prior.npz") as archive:
        for name in archive.namelist():
            assert np.load(archive.open(name), allow_pickle=False).dtype.kind in "fU"


# --- Runs -------------------------------------------------------------------------------------------------------------

CONFIG = Config(
    data=Digits(validation=None),
    network=MLP((64,)),
    latent_size=6,
    decoder_variance=Optimal("batch"),
    optimizer=Optimizer(learning_rate=3e-3),
    epochs=30,
    batch_size=100,
    devices=1,
    evaluate_every=30,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(CONFIG, folder, progress=False)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_prior_lowers_the_mismatch(kind, run):
    """KL(q(z) || p(z)) of the training and of the test set, before and after, by more than its standard errors."""
    images = data.load(CONFIG.data)
    fitted = fit_prior(run, kind, components=8)
    before, after = (evaluate.evaluate(restore(run, prior=prior), images).report for prior in ("model", "fitted"))
    for split in ("train", "test"):
        one, other = before[split]["aggregate_kl"], after[split]["aggregate_kl"]
        assert one.value - other.value > 3 * np.hypot(one.standard_error, other.standard_error)
        assert other.value > -3 * other.standard_error  # a divergence
        # What the code says of the image has not changed, so the rate falls by as much: two samples of the same z.
        assert before[split]["mutual_information"].value == pytest.approx(after[split]["mutual_information"].value, abs=1e-4)
        gained = before[split]["rate"].value - after[split]["rate"].value
        assert gained == pytest.approx(one.value - other.value, abs=0.35)
        elbo = [report[split]["calibrated_elbo"].value for report in (before, after)]
        assert elbo[1] - elbo[0] == pytest.approx(gained, rel=1e-4)
    assert fitted.held_out - fitted.held_out_before > 0
    assert fitted.held_out - fitted.held_out_before == pytest.approx(
        before["test"]["rate"].value - after["test"]["rate"].value, abs=1.0
    )
    if kind == "mixture":
        assert "dimension_kl" in before["test"]
        assert "dimension_kl" not in after["test"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_what_is_held_out_is_of_images_that_nothing_was_chosen_by(kind, run, monkeypatch):
    """The latents of each image are its number; a flow is chosen by a half of what is held out, others by nothing."""
    numbers = np.arange(1_500.0)[:, None]
    monkeypatch.setattr(stage, "_posteriors", lambda *_: (numbers, 0 * numbers))
    parts = []

    def fit_to(kind, kept, reported, key, components, *chosen_by):
        parts.extend({int(number) for number in part.ravel()} for part in (kept, reported, *chosen_by))
        raise InterruptedError

    monkeypatch.setattr(stage, "fit_density", fit_to)
    with pytest.raises(InterruptedError):
        fit_prior(run, kind)
    assert [len(part) for part in parts] == ([1_350, 75, 75] if kind == "flow" else [1_350, 150])
    assert set.union(*parts) == set(range(1_500))  # no image is in two


@pytest.mark.long
def test_the_density_of_the_run_is_the_fitted_one(run, monkeypatch):
    monkeypatch.setattr(fitted_prior, "FLOW_EPOCHS", 2)
    fitted = bv.fit_prior(run, "flow")
    own = restore(run, prior="fitted")
    z = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    found = own.model.apply(own.variables, jnp.asarray(z), method="log_prior")
    np.testing.assert_allclose(found, fitted.log_prob(z), rtol=1e-4, atol=1e-4)  # compiled and not, in float32
    np.testing.assert_array_equal(
        own.model.apply(own.variables, jax.random.key(3), 9, method="sample_latents"), fitted.sample(jax.random.key(3), 9)
    )
    assert own.config == CONFIG  # how it was trained
    assert own.model.prior == Flow(latent_size=own.config.latent_size)
    plain = restore(run)
    x = jnp.full((2, 8, 8, 1), 0.5)
    for one, other in zip(*(r.model.apply(r.variables, x, method="encode") for r in (own, plain)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.long
def test_it_takes_the_place_of_a_learned_prior(tmp_path):
    config = dataclasses.replace(CONFIG, prior=configs.VampPrior(10), epochs=2, evaluate_every=2)
    fit(config, tmp_path, progress=False)
    fitted = fit_prior(tmp_path, "mixture", 3)
    own = restore(tmp_path, prior="fitted")
    assert own.model.prior == Mixture(3, "full", latent_size=own.config.latent_size)
    assert set(own.variables["params"]["prior_model"]) == {"logits", "mean", "log_diagonal", "upper"}
    assert fitted.held_out > fitted.held_out_before


@pytest.mark.long
def test_the_same_fit_is_not_repeated_and_another_not_lost(run, capsys):
    first = fit_prior(run, "mixture", 3, seed=1)
    content = (run / "prior.npz").read_bytes()
    again = fit_prior(run, "mixture", 3, seed=1)
    assert again.held_out == first.held_out
    assert (run / "prior.npz").read_bytes() == content
    for settings in (
        {"kind": "gaussian"},
        {"kind": "mixture", "components": 4},
        {"kind": "mixture", "components": 3, "seed": 2},
    ):
        with pytest.raises(
            UserError, match=r"holds another prior \(mixture of 3 Gaussians, seed 1, of step 450\); --overwrite"
        ):
            fit_prior(run, **{"seed": 1} | settings)
    assert (run / "prior.npz").read_bytes() == content
    # Numbers of the one that was there go with it.
    report = restored_report(run)
    write_evaluation(run, 450, {"test": {"fitted_rate": report["test"]["rate"]}})
    assert "fitted_rate" in restored_report(run)["test"]
    fit_prior(run, "gaussian", overwrite=True)
    assert read_fitted(run).kind == "gaussian"
    assert restored_report(run) == report


def restored_report(folder):
    return read_evaluation(folder).report


@pytest.mark.long
def test_the_seed_decides(run):
    values = [fit_prior(run, "gaussian", seed=seed, overwrite=True).held_out for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


@pytest.mark.long
def test_devices_do_not_change_a_fit(run, monkeypatch):
    one = fit_prior(run, "gaussian")
    monkeypatch.setattr("bsvae_jax.training.fit_prior.data_mesh", lambda: data_mesh(1))
    other = fit_prior(run, "gaussian", overwrite=True)
    assert one.held_out == pytest.approx(other.held_out, abs=1e-4)


# --- The commands -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.usefixtures("unchecked")
def test_the_commands(run, capsys, tmp_path):
    main("fit-prior", run, "--kind", "mixture", "--components", 4)
    said = capsys.readouterr().out
    assert "mixture of 4 Gaussians, fitted to the latents of step 450" in said
    assert "nats per image" in said
    main("sample", run, "--count", 30, "--out", tmp_path / "fitted.npz", "--prior", "fitted")
    main("sample", run, "--count", 30, "--out", tmp_path / "own.npz")
    main("sample", run, "--count", 30, "--out", tmp_path / "fitted.png", "--prior", "fitted")
    drawn = [np.load(tmp_path / f"{name}.npz")["images"] for name in ("fitted", "own")]
    assert drawn[0].shape == (30, 8, 8, 1)
    assert np.any(drawn[0] != drawn[1])
    own = restore(run, prior="fitted")
    key = jax.random.fold_in(jax.random.key(0), 0)
    expected = own.model.apply(own.variables, key, 500, method="sample")[:30]
    np.testing.assert_allclose(drawn[0] / 255, np.clip(expected, 0, 1), atol=0.6 / 255)
    capsys.readouterr()
    main("evaluate", run, "--split", "test", "--samples", 2, "--prior", "fitted")
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.strip() and not line.startswith(" ")]
    for name in ("rate", "calibrated_elbo", "aggregate_kl", "importance_weighted_bound"):
        assert names.index(f"fitted_{name}") == names.index(name) + 1
    assert "with the fitted prior, mixture of 4 Gaussians" in "\n".join(lines)
    assert "fitted_mse" not in names
    values = {n: q["value"] for n, q in json.loads((run / "evaluation.json").read_text())["splits"]["test"].items()}
    assert values["fitted_rate"] < values["rate"]
    assert values["fitted_importance_weighted_bound"] > values["importance_weighted_bound"]
    assert values["fitted_calibrated_elbo"] - values["calibrated_elbo"] == pytest.approx(values["rate"] - values["fitted_rate"])
    with Image.open(run / "figures" / "fitted_prior.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors(256)) > 20
    # Asked for the model's prior alone, the others stay.
    main("evaluate", run, "--split", "test", "--no-figures")
    assert "fitted_rate" in json.loads((run / "evaluation.json").read_text())["splits"]["test"]


@pytest.mark.long
def test_a_run_that_was_stopped_early_has_come_to_its_end_and_an_exported_one_too(tmp_path):
    config = Config(network=MLP((8,)), latent_size=2, epochs=4, batch_size=500, devices=1)
    folder = fit(config, tmp_path / "run", False, [bv.EarlyStopping(1, min_improvement=1e6)]).workdir
    fitted = fit_prior(folder, "gaussian")
    assert fitted.step == restore(folder).step == 6
    out = bv.export_hub(folder, tmp_path / "exported")
    assert fit_prior(out, "gaussian").held_out == fitted.held_out
    assert restore(out, prior="fitted").config.prior == config.prior


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--components", 0], "components must be a whole number >= 1, got 0"),
        (["--components", 1351], "components 1351 exceeds the 1350 training images to fit them to (150 of 1500 are held out)"),
        (["--seed", -1], "seed must be a whole number >= 0, got -1"),
        (["--kind", "vamp"], "invalid choice 'vamp' for argument '--kind'"),
    ],
)
def test_wrong_options(options, sentence, run, capsys):
    assert sentence in refused(capsys, "fit-prior", run, *options).replace("\n", " ")
    assert not (run / "prior.npz").exists()


@pytest.mark.usefixtures("unchecked")
def test_runs_without_a_prior_to_use(run, tmp_path, capsys):
    for command in ("sample", "evaluate"):
        assert f"{run} has no fitted prior; bsvae fit-prior {run} fits one" in refused(
            capsys, command, run, "--prior", "fitted"
        )
    assert "is not a run" in refused(capsys, "fit-prior", tmp_path / "nothing")
    with pytest.raises(UserError, match="prior must be 'model' or 'fitted', got 'both'"):
        restore(run, prior="both")
    (tmp_path / "untrained").mkdir()
    shutil.copy(run / "config.json", tmp_path / "untrained")
    assert "has no checkpoint yet" in refused(capsys, "fit-prior", tmp_path / "untrained")


@pytest.mark.long
def test_an_unfinished_run(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, epochs=3, evaluate_every=1)
    save = Trainer._evaluate_and_save

    def stop(self, state, step, epoch):
        save(self, state, step, epoch)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_evaluate_and_save", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "cut", progress=False)
    with pytest.raises(UserError, match=r"cut is not trained to its end \(step 15 of 45\).*`bsvae train` continues it"):
        fit_prior(tmp_path / "cut")


@pytest.mark.long
def test_a_prior_of_other_parameters(run, tmp_path):
    fit_prior(run, "gaussian")
    for change, sentence in (
        ({"seed": 1}, r"was fitted to other parameters \(of step 450\) than those of the latest checkpoint \(step 30\)"),
        ({"latent_size": 3, "network": Linear()}, "is of 6 latents, this model has 3: it was fitted to another run"),
    ):
        folder = tmp_path / next(iter(change))
        fit(dataclasses.replace(CONFIG, **change, epochs=2, evaluate_every=2), folder, progress=False)
        shutil.copy(run / "prior.npz", folder)
        with pytest.raises(UserError, match=sentence):
            restore(folder, prior="fitted")
        with pytest.raises(UserError, match="holds another prior"):
            fit_prior(folder, "gaussian")


@pytest.mark.parametrize("content", [b"", b"PK", b"nothing of the kind"])
def test_a_damaged_file(content, run):
    (run / "prior.npz").write_bytes(content)
    for call in (lambda: restore(run, prior="fitted"), lambda: fit_prior(run, "gaussian")):
        with pytest.raises(UserError, match=r"prior.npz cannot be read.*bsvae fit-prior --overwrite makes it again"):
            call()
    assert fit_prior(run, "gaussian", overwrite=True).kind == "gaussian"


def test_a_file_whose_arrays_do_not_fit(run):
    fit_prior(run, "gaussian")
    arrays = dict(np.load(run / "prior.npz"))
    for change, sentence in (
        ({"parameters.mean": np.zeros((2, 6), np.float32)}, r"damaged \(ValueError: its arrays are not the parameters"),
        ({"about": np.array("{")}, "damaged"),
        ({"about": np.array(json.dumps(json.loads(str(arrays["about"])) | {"format": 9}))}, "newer bsvae_jax"),
        ({"about": np.array(json.dumps(json.loads(str(arrays["about"])) | {"prior": {"kind": "mixtur"}}))}, "Unknown kind"),
    ):
        np.savez(run / "prior.npz", **arrays | change)
        with pytest.raises(UserError, match=sentence):
            restore(run, prior="fitted")
