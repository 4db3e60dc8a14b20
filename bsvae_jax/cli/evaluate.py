"""`bsvae evaluate`: the numbers and figures of a trained run."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bsvae_jax.cli.document import document
from bsvae_jax.cli.environment import numbers_without_figures
from bsvae_jax.cli.options import Data, Merged, Prior, Run
from bsvae_jax.cli.report import print_report
from bsvae_jax.errors import UserError, check_count

if TYPE_CHECKING:
    from bsvae_jax.data import ImageSet
    from bsvae_jax.data.datasets import Dataset
    from bsvae_jax.evaluation.evaluate import Evaluated
    from bsvae_jax.evaluation.trained import Restored


def evaluate(
    run: Merged[Run],
    data: Data,
    split: tuple[Literal["train", "test", "validation"], ...] | None = None,
    posterior_samples: int | None = None,
    samples: int | None = None,
    bound_images: int | None = None,
    fid: int | None = None,
    protocol: Literal["standard", "paper"] = "standard",
    fid_network: Literal["inception", "lenet"] = "inception",
    inception_weights: Path | None = None,
    prior: Prior = "model",
    figures: bool = True,
    json: bool = False,
) -> None:
    """Evaluate a trained run, or every finished member of a sweep: a table with units and standard errors, and figures.

    The profile likelihood gives each image its own optimal variance and is not a density; the calibrated one freezes the
    training set's variance and is. Compare models by the calibrated one. The numbers go to evaluation.json in the folder
    (of --checkpoint best to evaluation_best.json), the figures to figures/. Long computations continue where they were
    interrupted.

    With --json: {"workdir", "step", "checkpoint", "splits": {split: {name: {"value", "standard_error", "unit", "meaning"}}},
    "figures": folder or null}; of a sweep what bsvae report --json prints, with all numbers of its members; of a sweep's best
    checkpoints, of which there is no report, {"workdir", "checkpoint": "best", "members": {name: as of a run}}.

    Args:
      run: A trained run or a sweep.
      data: The data that the run was trained on.
      split: Splits to evaluate; all that the data have if not given.
      posterior_samples: Samples of q(z|x) of each image; those of the run's config if not given: as many as make 10,000 of a
        split, at most 16.
      samples: Importance samples per image for a tighter bound of log p(x), 1 to 5,000; no such bound if not given.
      bound_images: Take that bound of the first so many images only.
      fid: Compute FID and KID with so many samples of the prior against the images of each split; 10,000 is usual.
      protocol: The paper stretches the contrast of each of 25,600 samples before FID; its numbers are marked as such.
      fid_network: The published network; or a LeNet trained here on the classes of the data, as for KID of MNIST, whose numbers
        have names of their own and need no download.
      inception_weights: Weights of the published network, pytorch-fid's .pth or an .npz; downloaded at first use if not given.
      prior: fitted gives the numbers under the density of bsvae fit-prior as well, beside those of the model's own.
      figures: Draw figures.
      json: Print one JSON document on standard output.
    """
    from bsvae_jax.data import load
    from bsvae_jax.data.datasets import moved
    from bsvae_jax.evaluation.evaluate import PAPER_SAMPLES, Fid
    from bsvae_jax.evaluation.fid.inception import load_weights
    from bsvae_jax.evaluation.importance_weighted import check_samples

    if split == ():
        raise UserError("--split needs at least one of train, test and validation.")
    if posterior_samples is not None:
        check_count("--posterior-samples", posterior_samples)
    if samples is not None:
        check_samples(samples)
    if protocol == "paper" and fid is None:
        fid = PAPER_SAMPLES
    if fid is None and inception_weights is not None:
        raise UserError("--inception-weights is for FID; give --fid N, the number of samples, as well.")
    if fid is None and fid_network != "inception":
        raise UserError("--fid-network is for FID; give --fid N, the number of samples, as well.")
    if fid_network == "lenet" and inception_weights is not None:
        raise UserError("--inception-weights is for --fid-network inception; lenet is trained on the data.")
    options = None
    if fid is not None:
        options = Fid(fid, protocol=protocol, network=fid_network)
        if inception_weights is not None:
            options = dataclasses.replace(options, weights=load_weights(inception_weights))

    @functools.cache  # members of a sweep share their data
    def load_once(source: "Dataset") -> "ImageSet":
        return load(source if data.path is None else moved(source, data.path))

    numbers: dict[str, Any] = dict(
        posterior_samples=posterior_samples, samples=samples, bound_images=bound_images, fid_options=options
    )
    evaluate_in = functools.partial(_evaluate_run, run, load_once, split, numbers, prior)
    with document(json) as found:
        run.load_classes()
        if not (run.workdir / "sweep.json").is_file():
            found |= evaluate_in(run.workdir, figures)
            return
        from bsvae_jax.sweeps.results import read_results

        members = {}
        for member in read_results(run.workdir).members:
            print(f"\n{member.name}")
            members[member.name] = evaluate_in(run.workdir / "members" / member.name, False)
        if run.checkpoint == "latest":
            found |= print_report(run.workdir)
        else:  # the report is of the latest
            found |= {"workdir": run.workdir, "checkpoint": run.checkpoint, "members": members}


def _evaluate_run(
    run: Run,
    load: "Callable[[Dataset], ImageSet]",
    split: tuple[str, ...] | None,
    numbers: dict[str, Any],
    prior: Prior,
    folder: Path,
    figures: bool,
) -> dict[str, Any]:
    from bsvae_jax.evaluation import diagnostic_figures, metrics
    from bsvae_jax.evaluation import evaluate as evaluation
    from bsvae_jax.training.evaluated import write_evaluation
    from bsvae_jax.training.fitted_prior import read_fitted
    from bsvae_jax.training.per_image import write_per_image
    from bsvae_jax.training.workdir import check_same_data, read_info

    restored = run.restore("model", folder)
    with_fitted = run.restore("fitted", folder) if prior == "fitted" else None
    images = load(restored.config.data)
    info = read_info(folder)
    check_same_data(folder, info, images)

    def evaluate(restored: "Restored") -> "Evaluated":
        return evaluation.evaluate(restored, images, split, **numbers, workdir=folder, progress=True)

    evaluated = evaluate(restored)
    report = evaluated.report
    if with_fitted is not None and (fitted := read_fitted(folder)) is not None:
        report = metrics.beside(report, evaluate(with_fitted).report, fitted.describe())
    write_evaluation(folder, restored.step, report, run.checkpoint)
    if run.checkpoint == "latest" and (test := evaluated.splits.get("test")) is not None:
        write_per_image(folder, restored.step, metrics.calibrated_elbo(test.scores, evaluated.calibration))
    print(metrics.as_table(report))
    if restored.config.classes is not None:
        print(metrics.CONDITIONAL)
    if (sentence := metrics.left_out(images)) is not None:
        print(sentence)
    print("".join(f"{sentence}\n" for sentence in info.provenance()), end="")
    found = {"workdir": folder, "step": restored.step, "checkpoint": run.checkpoint, "splits": metrics.as_json(report)}
    if not figures:
        return {**found, "figures": None}
    with numbers_without_figures():
        diagnostic_figures.draw(restored, images, evaluated, folder)
        if with_fitted is not None:
            diagnostic_figures.draw_fitted(restored, with_fitted, images, evaluated, folder)
        print(f"figures: {folder / 'figures'}")
    return {**found, "figures": folder / "figures"}
