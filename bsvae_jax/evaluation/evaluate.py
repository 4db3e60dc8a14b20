"""Evaluation of a restored run: every number that can be said of it, and the figures that show where it comes from."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bsvae_jax._io.files import as_path, cache_folder, digest
from bsvae_jax._io.terminal import ProgressBar, log
from bsvae_jax.config import StandardNormal
from bsvae_jax.data import ImageSet
from bsvae_jax.data.image_set import no_images, to_unit_interval
from bsvae_jax.data.prefetch import DeviceImages, fits
from bsvae_jax.distributed.mesh import data_mesh, replicate
from bsvae_jax.errors import UserError, check_count, check_kind, nearest, shown
from bsvae_jax.evaluation import aggregate_posterior, importance_weighted, residuals
from bsvae_jax.evaluation.fid import distance as fid
from bsvae_jax.evaluation.fid import inception, lenet, statistics
from bsvae_jax.evaluation.fid.features import FeatureNetwork
from bsvae_jax.evaluation.importance_weighted import Density, ImportanceScores
from bsvae_jax.evaluation.metrics import Quantity, Report, mean_quantity, summarize
from bsvae_jax.evaluation.sampling import sample_batches, stretch_contrast, to_8_bits
from bsvae_jax.evaluation.scores import (
    Calibration,
    SplitScores,
    calibrate,
    evaluation_batch,
    samples_of_each,
    score_split,
    split_key,
)
from bsvae_jax.evaluation.trained import Restored
from bsvae_jax.evaluation.unfinished_bound import UnfinishedBound
from bsvae_jax.objective import bits_per_dimension
from bsvae_jax.random import make_key

PAPER_SAMPLES = 25_600
"""Images drawn for FID by the code of Kim & Lee (2024)."""

BOUND_SALT = 0x65760003
"""Folded into a split's key for its importance samples."""
FID_SALT = 0x65760004
"""Folded into the config's seed for the samples of FID."""


@dataclasses.dataclass(frozen=True)
class Fid:
    """How FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) are computed.

    >>> Fid(samples=PAPER_SAMPLES, protocol="paper")  # for `evaluate(..., fid_options=...)`
    Fid(samples=25600, weights=None, protocol='paper', network='inception')

    Raises:
      UserError: fewer than 4 samples, another protocol or network, or what does not go with 'lenet'.
    """

    samples: int = 10_000
    """Images drawn from the prior; of a conditional run, of classes drawn from the labels of the training images."""
    weights: inception.Weights | None = None
    """Of `inception.load_weights`; None: downloaded at first use."""
    protocol: Literal["standard", "paper"] = "standard"
    """'paper': every sample's contrast is stretched to [0, 1] first, as the code of Kim & Lee (2024) does; not comparable."""
    network: Literal["inception", "lenet"] = "inception"
    """'lenet': a small network trained on the classes of the data, for `lenet_fid` and `lenet_kid`; see the module `lenet`."""

    def __post_init__(self) -> None:
        if not isinstance(self.samples, int) or self.samples < 4:
            raise UserError(f"FID needs samples, at least 4, got {shown(self.samples)}; 10,000 or more make it comparable.")
        if self.weights is not None:
            check_kind("weights", self.weights, inception.Weights, "inception.load_weights reads them")
        if self.protocol not in ("standard", "paper"):
            raise UserError(f"The protocol must be 'standard' or 'paper', got {self.protocol!r}.")
        if self.network not in ("inception", "lenet"):
            raise UserError(f"The network must be 'inception' or 'lenet', got {self.network!r}.")
        if self.network == "lenet" and (self.weights is not None or self.protocol == "paper"):
            other = "weights are" if self.weights is not None else "the paper's protocol is"
            raise UserError(f"{other.capitalize()} for the network 'inception'; 'lenet' is trained on the data.")


class SplitEvaluation(NamedTuple):
    """What the numbers of one split were made of."""

    scores: SplitScores
    per_image: residuals.ImageStatistics
    rate: aggregate_posterior.RateSplit
    half_information: float
    """I(x; z) of every other image, nats."""
    bound: ImportanceScores | None
    densities: tuple[Density, ...]


class Evaluated(NamedTuple):
    """The result of `evaluate`."""

    report: Report
    splits: dict[str, SplitEvaluation]
    """What figures are drawn from."""
    calibration: Calibration


def evaluate(
    run: Restored,
    images: ImageSet,
    splits: Sequence[str] | None = None,
    *,
    posterior_samples: int | None = None,
    samples: int | None = None,
    bound_images: int | None = None,
    fid_options: Fid | None = None,
    workdir: str | Path | None = None,
    progress: bool = False,
) -> Evaluated:
    """Evaluate a restored run on splits of its data, over all devices. What is no image in [0, 1] has neither PSNR nor SSIM.

    Args:
      run: from `restore`.
      images: the data of its config, from `data.load`.
      splits: of 'train', 'test' and, where the data have it, 'validation', in the order to report; None: all of the data's.
      posterior_samples: of each image; None: as the config says, see `Config.posterior_samples`.
      samples: importance samples per image, 1 to 5,000; None: no importance-weighted bound (Burda et al. 2016).
      bound_images: of the first images of each split for that bound; None: all.
      fid_options: None: no FID.
      workdir: where long computations are kept in case they are interrupted; None: nowhere.
      progress: show a bar on stderr.

    Returns:
      The report, `{split: {name: Quantity}}` (each with its unit, most in nats per example), and what it was made of. The
      training set is scored as well if the run has not recorded its calibration.

    >>> import tempfile
    >>> import bsvae_jax as bv
    >>> from bsvae_jax.config import MLP
    >>> config = bv.Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     images = bv.fit(config, folder, progress=False).images
    ...     report = evaluate(bv.restore(folder), images, splits=("test",)).report
    >>> report["test"]["profile_elbo"].unit, report["test"]["calibrated_bits_per_dimension"].unit
    ('nats', 'bits/dim')

    Raises:
      UserError: an unknown split, images of another shape than the model's, a number out of range, or a model whose
        parameters are not finite; for FID, what is no image [H, W, C] of 1 or 3 channels, weights that cannot be had, or for
        'lenet' images without classes.
    """
    check_kind("run", run, Restored, "bsvae_jax.restore(workdir) opens one")
    check_kind("images", images, ImageSet, "bsvae_jax.data.load(run.config.data) reads them")
    splits = images.splits if splits is None else splits
    if posterior_samples is not None:
        check_count("posterior_samples", posterior_samples)
    _check(run, images, splits, samples, bound_images)
    check_kind("fid_options", fid_options, (Fid, type(None)))
    workdir = None if workdir is None else as_path(workdir, "workdir")
    if workdir is not None and not workdir.is_dir():
        raise UserError(f"There is no folder {workdir}; workdir must name one, or be None.")
    network = None if fid_options is None else _feature_network(fid_options, images, progress)
    mesh = data_mesh()
    variables = replicate(run.variables, mesh)

    @functools.cache
    def stored(split: str) -> DeviceImages:
        resident = fits(images.shape.nbytes, mesh, run.config.resident_memory)
        return DeviceImages(images.examples(split, run.config.classes), mesh, resident)

    def score(split: str, number: int, calibration: Calibration | None) -> SplitScores:
        # The same posterior samples as `fit` takes, so that its evaluation is repeated here.
        options: Any = dict(batch_size=evaluation_batch(run.image_shape), samples=number, calibration=calibration)
        return score_split(run.model, variables, stored(split), split_key(run.config.seed, split), **options)

    asked = run.config.posterior_samples if posterior_samples is None else posterior_samples
    calibration = run.calibration
    if calibration is None:
        calibration = calibrate(score("train", 1, None), run.step, run.floor)
    scores = {split: score(split, samples_of_each(asked, len(stored(split))), calibration) for split in splits}
    report: Report = {}
    evaluated = {}
    for split in splits:
        parts = _evaluate_split(
            run, images, split, stored(split), scores[split], variables, calibration, samples, bound_images, workdir, progress
        )
        evaluated[split] = parts
        summary = summarize(scores[split], run.beta, calibration, images.holds_images, run.config.beta_schedule)
        report[split] = summary | _quantities(parts, images, samples)
    if fid_options is not None and network is not None:
        folder = cache_folder() / "samples" if workdir is None else workdir
        made_of = (digest(run.variables)[:16], fid_options.protocol, network.source[:16], str(fid_options.samples))
        kept = folder / f".fid-{'-'.join(made_of)}.npz"
        drawn = _sample_statistics(run, images, network, fid_options, mesh, kept, progress)
        for split in splits:
            report[split] |= _fid_quantities(drawn, images, split, network, fid_options, mesh, progress)
        kept.unlink(missing_ok=True)  # of no use once the distances are known
    return Evaluated(report, evaluated, calibration)


def _check(run: Restored, images: ImageSet, splits: Sequence[str], samples: int | None, bound_images: int | None) -> None:
    known = f"{', '.join(images.splits[:-1])} and {images.splits[-1]}"
    if not isinstance(splits, Sequence) or isinstance(splits, str) or not splits:
        raise UserError(f"splits must be some of the names {known}, as in ('test',), got {splits!r}.")
    for split in splits:
        if split not in images.splits:
            raise UserError(f"There is no split {split!r}{nearest(str(split), images.splits)}; the splits are {known}.")
    if images.image_shape != run.image_shape:
        raise UserError(f"The model takes images of shape {run.image_shape}, the data have {images.image_shape}.")
    for split in {"train", *splits}:
        images.examples(split, run.config.classes)
    if samples is not None:
        importance_weighted.check_samples(samples)
    if bound_images is not None and (not isinstance(bound_images, int) or bound_images < 1):
        raise UserError(f"The bound needs at least one image, got {bound_images!r}.")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.variables)):
        raise UserError(
            f"The parameters of step {run.step} are not finite: this run has diverged, there is nothing to evaluate."
        )


def _evaluate_split(
    run: Restored,
    images: ImageSet,
    split: str,
    stored: DeviceImages,
    scores: SplitScores,
    variables: Any,
    calibration: Calibration,
    samples: int | None,
    bound_images: int | None,
    workdir: Path | None,
    progress: bool,
) -> SplitEvaluation:
    key = split_key(run.config.seed, split)
    with ProgressBar(len(stored), 0, progress) as bar:
        bar.describe(f"{split}: residuals")
        found = residuals.image_statistics(
            run.model,
            variables,
            stored,
            key,
            calibration,
            batch_size=evaluation_batch(run.image_shape),
            similarity=images.holds_images,
            progress=bar.update,
        )
    normal = isinstance(run.model.prior, StandardNormal)
    posteriors = found.z, found.posterior_mean, found.posterior_log_variance, found.log_prior
    rate, half_information = aggregate_posterior.rate_and_half_information(*posteriors, normal)
    if samples is None:
        return SplitEvaluation(scores, found, rate, half_information, None, ())
    wanted = [Density(frozen=True, dequantized=False), Density(frozen=True, dequantized=True)]
    if importance_weighted.has_own_density(run.model):
        wanted += [Density(frozen=False, dequantized=False), Density(frozen=False, dequantized=True)]
    count = min(bound_images or len(stored), len(stored))
    identity = [digest(run.variables), samples, count, calibration.variance, images.fingerprint(run.config.classes)]
    file = UnfinishedBound(workdir, split, identity)
    partial = file.read()
    with ProgressBar(count, 0 if partial is None else partial.done, progress) as bar:
        bar.describe(f"{split}: {samples} importance samples")
        bound = importance_weighted.importance_weighted(
            run.model,
            variables,
            stored,
            jax.random.fold_in(key, BOUND_SALT),
            wanted,
            calibration.variance,
            samples,
            count=count,
            partial=partial,
            progress=bar.update,
            keep=file.write,
        )
    file.remove()
    return SplitEvaluation(scores, found, rate, half_information, bound, tuple(wanted))


# --- Numbers ----------------------------------------------------------------------------------------------------------


def _quantities(parts: SplitEvaluation, images: ImageSet, samples: int | None) -> dict[str, Quantity]:
    """What the images and the bounds of a split amount to."""
    rate = parts.rate
    most, half = math.log(len(parts.per_image.z)), parts.half_information
    saturated = float(rate.mutual_information.mean()) - half > aggregate_posterior.RISE
    limit = f" <= log N = {most:.2f}; {half:.2f} of half the images"
    limit += ", SATURATED: more images would raise it" if saturated else ""
    limited = "; too high, see mutual_information" if saturated else ""
    one_sigma = residuals.residual_coverage(parts.per_image.residuals[0], np.array([1.0]))
    found = {}
    if parts.per_image.ssim is not None:
        window = residuals.window(*images.image_shape[:2])
        meaning = f"structural similarity of image and reconstruction, {window}-pixel window"
        found["ssim"] = mean_quantity(parts.per_image.ssim, "", meaning)
    found |= {
        "residuals_within_one_sigma": Quantity(
            float(one_sigma[0]), None, "", "share of residuals within one calibrated standard deviation; 0.683 if Gaussian"
        ),
        "mutual_information": mean_quantity(rate.mutual_information, "nats", f"I(x; z) of index and code{limit}"),
        "aggregate_kl": mean_quantity(rate.aggregate_kl, "nats", f"KL(q(z) || p(z)), aggregate posterior and prior{limited}"),
    }
    if rate.total_correlation is not None and rate.dimension_kl is not None:
        found["total_correlation"] = mean_quantity(rate.total_correlation, "nats", f"KL(q(z) || prod_l q(z_l)){limited}")
        found["dimension_kl"] = mean_quantity(rate.dimension_kl.sum(axis=1), "nats", "sum_l KL(q(z_l) || p(z_l))")
    if parts.bound is not None and samples is not None:
        found |= _bound_quantities(parts.bound, parts.densities, images, samples)
    return found


def bound_name(density: Density) -> str:
    """How a density's bound is called in reports."""
    name = "importance_weighted_bound" if density.frozen else "own_importance_weighted_bound"
    return f"{name}_dequantized" if density.dequantized else name


def _bound_quantities(
    bound: ImportanceScores, densities: Sequence[Density], images: ImageSet, samples: int
) -> dict[str, Quantity]:
    found = {}
    shape, step = images.image_shape, images.bin_width
    for density, values, effective in zip(densities, bound.log_likelihood, bound.effective_samples, strict=True):
        variance = "calibrated variance" if density.frozen else "the model's own variance"
        point = "with uniform noise u, " if density.dequantized else "at the grid point, "
        meaning = f"lower bound of log p(x), K = {samples}, {len(values)} images, {point}{variance}"
        found[bound_name(density)] = mean_quantity(values, "nats", meaning)
        if density.dequantized:
            bits = np.asarray(bits_per_dimension(-values, shape, step))
            name = f"{bound_name(density).removesuffix('_dequantized')}_bits_per_dimension"
            found[name] = mean_quantity(bits, "bits/dim", "upper bound, from the dequantized one")
        elif density.frozen:
            found["effective_samples"] = mean_quantity(
                effective, "", f"of the {samples}; near 1, the bound would still rise much"
            )
    return found


# --- FID --------------------------------------------------------------------------------------------------------------


def _feature_network(options: Fid, images: ImageSet, progress: bool) -> FeatureNetwork:
    if not images.holds_images:
        raise UserError(
            f"FID compares images [H, W, C] in [0, 1]; the examples of {images.name} are {no_images(images.image_shape)}."
        )
    if images.image_shape[2] not in (1, 3):
        raise UserError(f"FID takes images of 1 or 3 channels, these have {images.image_shape[2]}.")
    if options.network == "lenet":
        return lenet.network(images, progress)
    return (options.weights or inception.load_weights()).network()


def _groups(images: ImageSet, split: str, first: int) -> Iterator[np.ndarray]:
    stored = getattr(images, split)
    for start in range(first, len(stored), statistics.GROUP):
        group = stored[start : start + statistics.GROUP]
        kept = group.dtype == np.uint8 and images.levels == 256
        yield group if kept else to_8_bits(np.asarray(to_unit_interval(group, images.levels)))


def _sample_statistics(
    run: Restored, images: ImageSet, network: FeatureNetwork, options: Fid, mesh: Mesh, path: Path, progress: bool
) -> statistics.FeatureStatistics:
    """Of samples of the prior; those of a conditional model are of classes drawn from the labels of the training images."""
    seed = int(jax.random.bits(jax.random.fold_in(make_key(run.config.seed), FID_SALT), dtype=jnp.uint32))
    classes = run.config.classes
    labels: Any = () if classes is None else images.examples("train", classes).labels
    labels = labels if classes is None else np.random.default_rng(seed).choice(labels, options.samples)

    def drawn(first: int) -> Iterator[np.ndarray]:
        for means in sample_batches(run, options.samples, seed, first, labels):
            yield to_8_bits(stretch_contrast(means) if options.protocol == "paper" else means)

    return _statistics(network, drawn, options.samples, mesh, path, f"{network.name}: samples", progress)


def _statistics(
    network: FeatureNetwork,
    images: Callable[[int], Iterator[np.ndarray]],
    total: int,
    mesh: Mesh,
    path: Path,
    description: str,
    progress: bool,
) -> statistics.FeatureStatistics:
    with ProgressBar(total, 0, progress) as bar:
        bar.describe(description)
        return statistics.feature_statistics(network, images, total, mesh, path, bar.update, bar.update)


def _fid_quantities(
    drawn: statistics.FeatureStatistics,
    images: ImageSet,
    split: str,
    network: FeatureNetwork,
    options: Fid,
    mesh: Mesh,
    progress: bool,
) -> dict[str, Quantity]:
    path = cache_folder() / "fid" / f"{images.fingerprint()[:32]}-{split}-{network.source[:16]}.npz"
    reference = _statistics(
        network,
        functools.partial(_groups, images, split),
        len(getattr(images, split)),
        mesh,
        path,
        f"{network.name}: {split} images (kept in {path.parent})",
        progress,
    )
    few = min(reference.moments.size, drawn.moments.size)
    if few <= network.size:
        log.warning(
            f"FID of {few} images has covariances of rank {few - 1} in {network.size} dimensions and is far too high; "
            f"use more than {network.size:,}, 10,000 to be comparable. KID is unbiased."
        )
    moments = (drawn.moments, reference.moments)
    distance = fid.frechet_distance(*(part for m in moments for part in (m.mean, m.covariance)))
    kernel = fid.kernel_distance(drawn.features, reference.features)
    paper = "" if options.protocol == "standard" else "; PAPER'S PROTOCOL: contrast of each sample stretched"

    def against(samples: int, others: int) -> str:
        return f"{samples} samples against {others} {split} images{paper}{network.note}"

    suffix = "" if options.protocol == "standard" else "_paper_protocol"
    return {
        f"{network.prefix}fid{suffix}": Quantity(
            distance, None, "", f"Frechet {network.name} distance, {against(*(m.size for m in moments))}"
        ),
        f"{network.prefix}kid{suffix}": Quantity(
            kernel.value,
            kernel.standard_error,
            "",
            f"kernel {network.name} distance (unbiased; error over blocks), "
            + against(len(drawn.features), len(reference.features)),
        ),
    }
