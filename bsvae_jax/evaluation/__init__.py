"""What can be said of a trained model: likelihoods, latents, residuals, distances between images, and figures of them.

Begin with `scores`, the one pass over a data set that everything else is computed from, and `metrics`, the numbers with their
units; `evaluate` computes all. `plots` draws arrays, `figures` draws models; `fid` compares distributions of images. A new
figure is a function of arrays in `plots`, called in `figures`. What is computed:

* Likelihood: profile and calibrated ELBO, averaged over posterior samples of each image, as many as make 10,000 of a split and
  at most 16, with the noise that they leave; and the importance-weighted bound with exactly K samples (1 to 5,000, in bounded
  memory) at the grid points and with dequantization noise, in nats and bits/dim, with the effective number of samples. On
  linear models, whose likelihood is known, the bound is exact to 0.05 nats.
* Where the bits go: the rate as mutual information I(x; z), total correlation and dimension-wise KL. I(x; z) of N images is at
  most log N; the table says when it is saturated.
* Where the assumption of an optimal variance holds: whether residuals are N(0, sigma^2) (QQ plot, reliability curve), maps of
  the squared error and of sigma per pixel, sigma^2*(x) against the difficulty of x; SSIM, PSNR, interpolations, and the
  nearest training images of samples.
* FID and KID, by the published network or by a LeNet of the data's own classes: see `fid`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
