"""`bsvae fit-prior`: a density of the latents of a trained run."""

from typing import Literal

from bsvae_jax.cli.options import Data, Merged, Run


def fit_prior(
    run: Merged[Run],
    data: Data,
    kind: Literal["gaussian", "mixture", "flow", "flow_matching"] = "mixture",
    components: int = 10,
    seed: int = 0,
    overwrite: bool = False,
    steps: int = 10_000,
    width: int = 128,
    depth: int = 4,
) -> None:
    """Fit a density to the latents of a trained run, for bsvae sample and evaluate --prior fitted.

    It is fitted to samples of the posteriors of nine tenths of the training images and kept in WORKDIR/prior.npz; the model
    stays as it is. Samples of the prior that decode badly usually lie where no image has its posterior: this density does not
    go there.

    Example: bsvae fit-prior runs/digits --kind mixture --components 20

    Args:
      run: A trained run, or a member of a sweep; the prior is of the one checkpoint.
      data: The data that the run was trained on.
      kind: A Gaussian or a mixture of Gaussians with full covariances, a flow of affine coupling layers, or flow matching: a
        transformer over the latent map, trained by gradient descent. An interrupted training continues when it is given again.
      components: Number of Gaussians of a mixture.
      seed: Seed of the samples of the posteriors and of the fit's starting point.
      overwrite: Replace a prior of another kind or checkpoint.
      steps: Training steps, for flow matching.
      width: Width of the transformer of flow matching.
      depth: Number of its blocks.
    """
    from bsvae_jax.training import fit_prior as fitting
    from bsvae_jax.training.fitted_prior import FILE

    run.load_classes()
    workdir, settings = run.workdir, (kind, components, seed, run.checkpoint, overwrite, steps, width, depth)
    fitted = fitting.fit_prior(workdir, *settings, progress=True, data_path=data.path)
    before = "" if fitted.held_out_before is None else f", {fitted.held_out_before:.2f} under the model's own prior"
    print(
        f"{fitted.describe()}, fitted to the latents of step {fitted.step}: {workdir / FILE}\n"
        f"log density of the latents of held-out training images: {fitted.held_out:.2f} nats per image{before}; their rate "
        "falls by the difference.\n"
        f"bsvae sample {workdir} --prior fitted and bsvae evaluate {workdir} --prior fitted use it."
    )
