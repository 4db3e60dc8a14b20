"""The networks: encoders, decoders, priors, and the VAE made of them.

Begin with `vae`, which ties an encoder, a decoder, a prior and a decoder variance together. `linear`, `mlp`, `residual` and
`latent_map` have an encoder and a decoder each; `priors` has the densities of the latents; `layers` what all of them share;
`pytorch` carries published weights over.
"""
