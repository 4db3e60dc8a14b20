"""What can be said of a trained model: likelihoods, latents, residuals, distances between images, and figures of them.

Begin with `scores`, the one pass over a data set that everything else is computed from, and `metrics`, the numbers with their
units; `evaluate` computes all. `plots` draws arrays, `figures` draws models; `fid` compares distributions of images.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
