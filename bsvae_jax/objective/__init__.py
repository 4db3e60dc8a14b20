"""The loss: pure functions of arrays, in nats per example.

Begin with `elbo`.
"""
