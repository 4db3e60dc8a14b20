"""Gaussian VAEs in JAX with their decoder variance treated properly: the reference implementation of Beta-Sigma VAE.

    import bsvae_jax as bv

The loss is made of pure functions of arrays (`gaussian_nll`, `optimal_gaussian_nll`, `kl_to_standard_normal`,
`elbo_terms`, `mean_objective`); `VAE` is the Flax model; `theory` holds what is known exactly. Whole experiments, as the
command line runs them:

    load_config(path)                              the `Config` of a file
    data.load(source)                              training and test images, prepared at the first use: `ImageSet`
    prepare(images, folder)                        writes images from any iterable, for `Arrays(folder)`
    fit(config, workdir)                           trains, or continues: `FitResult`, with the images and every number
    fit_sweep(config, grid, workdir)               trains every member of a `Sweep`: `SweepResult`
    restore(workdir)                               opens a run, also with a fitted prior: `Restored`
    evaluate(run, images)                          every number of a run; with a `Fid`, FID and KID too
    read_metrics, read_results, write_report       rows of a run, results of a sweep, its report
    list_runs(folder), compare_runs(folders)       what there is, how far it has come; runs side by side
    fit_prior(workdir, kind)                       a density of the latents of a run whose training is over
    train_step, TrainState.create                  one step of any `VAE`, for a loop of your own; `distributed.parallelize`
    failed_step(workdir)                           the arguments of the step that was not finite
    import_torch, export_safetensors               weights from the paper's PyTorch network; weights for other programs
    export_hub(workdir, folder)                    weights, numbers and a model card for a hub; restore opens the folder
    export_stablehlo(workdir, folder)              encoder and decoder as programs that JAX runs without this package

A wrong argument is a `UserError`, which is a `ValueError`; training that is not finite is a `DivergenceError` (both are
`BsvaeError`s), a signal an `Interrupted`. Importing the package touches no device, and loads nothing: a public name is imported
when it is first used. `__init__.pyi` says where each of them is from.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
