"""Paired differences between the models of a sweep, against SciPy and against layouts whose true error is known."""

import csv
import io
import math

import numpy as np
import pytest
from scipy import stats

from bsvae_jax.config import Config
from bsvae_jax.evaluation.metrics import Quantity
from bsvae_jax.objective import Constant, Optimal
from bsvae_jax.sweeps import report, table
from bsvae_jax.sweeps.differences import paired_difference
from bsvae_jax.sweeps.results import MemberResult, SweepResults


def test_of_one_seed_it_is_the_paired_t_test():
    one, other = np.random.default_rng(0).normal(size=(2, 1, 50)) + np.array([3.0, 1.0]).reshape(2, 1, 1)
    found = paired_difference(one, other)
    assert found.mean == pytest.approx((one - other).mean())
    assert found.mean / found.standard_error == pytest.approx(stats.ttest_rel(one[0], other[0]).statistic)


@pytest.mark.parametrize(("of_seeds", "too_large"), [(0.4, 1.0), (0.0, 1.2)])
def test_the_error_holds_what_seeds_and_images_do(of_seeds, too_large):
    """3 seeds, 40 images, deviations of seeds, images and the rest: the mean square of the error over 1,000 layouts.

    To 8%, over three of its own deviations. Where seeds do not matter what is estimated below 0 is left out: a fifth too large.
    """
    generator, (seeds, images, of_images, of_rest) = np.random.default_rng(0), (3, 40, 1.0, 2.0)
    squares = []
    for _ in range(1_000):
        layout = of_seeds * generator.normal(size=(seeds, 1)) + of_images * generator.normal(size=images)
        layout = layout + of_rest * generator.normal(size=(seeds, images))
        squares.append(paired_difference(layout, np.zeros_like(layout)).standard_error ** 2)
    expected = of_seeds**2 / seeds + of_images**2 / images + of_rest**2 / (seeds * images)
    assert np.mean(squares) == pytest.approx(too_large * expected, rel=0.08)


IMAGES = np.random.default_rng(1).normal(scale=20.0, size=30)
"""How hard each of the test images is, for all models."""


def member(variance, beta, seed, level, kept=True):
    values = IMAGES + level + 0.1 * np.random.default_rng(seed).normal(size=30)
    elbo = {"calibrated_elbo": Quantity(float(values.mean()), 3.0, "nats", "")}
    config = Config(decoder_variance=variance, beta=beta, seed=seed)
    return MemberResult("m", config, {"test": elbo, "train": elbo}, {}, {}, values if kept else None)


def sweep(kept=True):
    """The best is Optimal at beta 1; of Constant there are other seeds, two of them in common; noise is that of the seed."""
    levels = {(Optimal(), 1.0): 7.0, (Optimal(), 2.0): 4.0, (Constant(0.5), 0.1): 5.0}
    seeds = {(Constant(0.5), 0.1): (1, 2, 5)}
    members = [
        member(variance, beta, seed, level, kept)
        for (variance, beta), level in levels.items()
        for seed in seeds.get((variance, beta), (0, 1, 2))
    ]
    return SweepResults(None, members, {}, [], {})  # type: ignore[arg-type]


def test_the_table_has_the_difference_of_the_same_images_and_seeds():
    """20 nats between images, 0.1 between samples: the same noise of the same seed leaves exact differences."""
    rows = list(csv.DictReader(io.StringIO(table.as_csv(sweep()))))
    found = {(row["split"], row["decoder_variance"], row["beta"]): row["calibrated_elbo_difference"] for row in rows}
    assert float(found["test", "optimal", "2.0"]) == pytest.approx(-3.0, abs=1e-12)
    assert float(found["test", "constant-0.5", "0.1"]) == pytest.approx(-2.0, abs=1e-12)
    assert found["test", "optimal", "1.0"] == found["train", "optimal", "2.0"] == ""
    for row in rows:
        error = row["calibrated_elbo_difference_standard_error"]
        assert (error == "") == (row["calibrated_elbo_difference"] == "")
        assert not error or float(error) < 1e-9
    headings, cells = table.display_rows(sweep(), "test")
    assert headings[-1] == table.HEADINGS["calibrated_elbo_difference"]
    assert [row[-1].split(" ")[0] for row in cells] == ["n/a", "-3", "-2"]
    assert "standard error over test images and seeds" in table.as_markdown(sweep())
    assert table.HEADINGS["calibrated_elbo_difference"] in table.as_text(sweep())


def test_the_table_has_what_a_fitted_prior_gives_beside_the_models_own():
    """Of the members that have one; 300 + 10 b and 100 + 10 b of FID at beta b, the same for all seeds."""
    results = sweep()
    for own in results.members:
        if isinstance(own.config.decoder_variance, Optimal):
            for name, start in (("lenet_fid", 300.0), ("fitted_lenet_fid", 100.0)):
                own.report["test"] = own.report["test"] | {name: Quantity(start + 10 * own.config.beta, 0.0, "", "")}
    rows = list(csv.DictReader(io.StringIO(table.as_csv(results))))
    found = {row["beta"]: row for row in rows if row["split"] == "test"}
    assert [float(found[beta]["lenet_fid_mean"]) for beta in ("1.0", "2.0")] == [310.0, 320.0]
    assert [float(found[beta]["fitted_lenet_fid_mean"]) for beta in ("1.0", "2.0")] == [110.0, 120.0]
    assert found["0.1"]["fitted_lenet_fid_mean"] == ""
    headings, *lines = table.as_text(results).splitlines()
    assert headings.split("  ")[-1].strip() == "FID (LeNet), fitted prior"
    assert [line.split("  ")[-1].strip() for line in lines if line.startswith(("BS-VAE", "β-VAE"))] == [
        "110 ± 0",
        "120 ± 0",
        "n/a",
    ]
    assert not {"fitted_rate", "fitted_fid"} & set(table.tabled_quantities(results))  # which none has


def test_the_report_compares_the_models_in_a_sentence():
    (sentence,) = report.differences(sweep())
    assert sentence.startswith(
        "Calibrated ELBO of the test set less that of BS-VAE, optimal σ² per image at β = 1, paired by image and seed: "
        "β-VAE, constant σ² = 0.5 at β = 0.1: -2"
    )
    assert sentence.endswith("nats (± standard error over images and seeds).")


def test_the_table_has_the_bound_that_compares_with_elbos():
    """That of images with the noise of their quantization, which is in every ELBO; not the one at the grid points."""
    bounds = dict.fromkeys(
        ("importance_weighted_bound", "importance_weighted_bound_dequantized"), Quantity(9.0, 1.0, "nats", "")
    )
    members = [one._replace(report={split: own | bounds for split, own in one.report.items()}) for one in sweep().members]
    headings, _ = table.display_rows(sweep()._replace(members=members), "test")
    assert [heading for heading in headings if "bound" in heading] == ["importance-weighted bound, dequantized [nats]"]
    assert "importance-weighted bound, dequantized" in table.as_text(sweep()._replace(members=members))


def test_members_of_which_no_images_were_kept_have_none():
    assert report.differences(sweep(kept=False)) == []
    assert table.HEADINGS["calibrated_elbo_difference"] not in table.display_rows(sweep(kept=False), "test")[0]
    assert "paired" not in table.as_markdown(sweep(kept=False))
    (row, *_) = csv.DictReader(io.StringIO(table.as_csv(sweep(kept=False))))
    assert row["calibrated_elbo_difference"] == ""
    assert not math.isnan(float(row["calibrated_elbo_mean"]))
