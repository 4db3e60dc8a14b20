"""Training: from a config to a run in a folder, and back from the folder to a model.

Begin with `step`, the pure function that is compiled; `program` lays it and the data on the devices; `trainer` has the loop,
`fit` the whole run, `callbacks` what is done beside it. `checkpoints` and `workdir` keep what a run leaves; `restore` reads
it. `fit_prior` fits a density to the latents of a trained run, `import_torch` and `export` carry weights in and out.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
