"""Gaussian VAEs in JAX with their decoder variance treated properly: the reference implementation of Beta-Sigma VAE."""
