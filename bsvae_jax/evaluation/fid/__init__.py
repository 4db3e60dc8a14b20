"""Distances between sets of images: FID and KID from the features of a network.

Begin with `distance`; `statistics` has the means and covariances over a set, `features` runs a network over it, `inception` is
the published network and `lenet` one trained on the classes of the data.
"""
