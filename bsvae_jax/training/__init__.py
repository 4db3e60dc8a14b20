"""Training: from a config to a run in a folder, and back from the folder to a model.

Begin with `step`, the pure function that is compiled, and `forward`, its loss; `program` lays it and the data on the devices;
`trainer` has the loop, `fit` the whole run, `callbacks` what is done beside it. `checkpoints` and `workdir` keep what is left;
`restore` reads it. `start` has what a run takes from another that it begins from. `fit_prior` fits a density to its latents,
`import_torch` and `export` carry weights in and out.

Any run may be interrupted and repeated. It ends with the numbers, files and figures of one never interrupted, to the bit on
the same hardware (on GPUs with `XLA_FLAGS=--xla_gpu_deterministic_ops=true`), and on another number of devices up to the
rounding of sums:

    Ctrl-C, SIGTERM            the step in flight is finished and saved; exit status 130 or 143; a second Ctrl-C quits at once
    SIGKILL, power loss        the steps since the last checkpoint (`evaluate_every` epochs) are repeated
    more epochs                after the last one: the run goes on, and `config.json` keeps what was changed and when
    a damaged checkpoint       is seen by its SHA-256, reported and moved aside; the one before is used
    a disk that is too small   refused before training; if it fills up later, saving pauses and says so, and the run goes on
    a disk only for reading    refused in a sentence; finished runs and prepared images on it are used
    a loss that is not finite  training stops; `failure.npz` keeps the state and the batch of that step, and the message has
                               the two lines that run it again under `jax.debug_nans`
    collapse                   of the variance or the posterior, a dead decoder and a trained variance that has not converged
                               are named while training, in `evaluation.json` and in a sweep's report, with what helps
    two commands in a folder   the second is refused; a dead process holds nothing

`python -m pytest -m faults -s` kills, damages and fills in earnest and prints what it counted. No pickle is ever run; a config
file is Python and does run. What is said goes to `logging.getLogger("bsvae_jax")`: with progress, on a terminal, beside a bar,
in a notebook a widget, in a file or a pipe a line every half minute.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
