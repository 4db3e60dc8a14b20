"""Distances between sets of images: FID and KID from the features of a network.

Begin with `distance`; `statistics` has the means and covariances over a set, `features` runs a network over it, `inception` is
the published network and `lenet` one trained on the classes of the data, which takes two minutes once on two CPU cores.

On the same weights FID is pytorch-fid's to 1e-4. Samples are quantized to 8 bits and nothing is stretched; the paper's
protocol, 25,600 samples with stretched contrast, has a name of its own in the report. The published weights are pytorch-fid's
`.pth`, downloaded at the first use, checked by its SHA-256 and read without running the pickle in it.
"""
