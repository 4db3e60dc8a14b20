"""What several tests need: random networks, relative errors, commands and their refusals, the blocks of README."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsvae_jax.cli import main as cli
from bsvae_jax.evaluation.fid import inception

README = Path(__file__).resolve().parents[1] / "README.md"


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """JAX computes in float64 inside. Its own context manager has another name in the oldest supported version."""
    before = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def relative_error(value, reference) -> float:
    """Largest difference over the largest entry of the reference."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape
    return float(np.max(np.abs(value - reference)) / np.max(np.abs(reference)))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_variables(module, inputs):
    """Every parameter and statistic random: no zero kernel or bias, unit scale or unit variance hides a missing term."""
    rng = np.random.default_rng(7)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            values = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        elif name in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = rng.normal(size=leaf.shape) * 0.3
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(module.init, jax.random.key(0), inputs))


def main(*arguments):
    """Run a command."""
    cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """What a command says on standard error that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    errors = capsys.readouterr().err
    assert stop.value.code == 2, errors
    assert "Traceback" not in errors
    return errors


def random_weights(seed=0):
    """Arrays by PyTorch's names that keep activations of order one, running statistics and all."""
    generator = np.random.default_rng(seed)
    arrays = {}
    for name, (_, shape) in inception._expected().items():
        if len(shape) == 4:
            height, width, inputs, outputs = shape
            scale = np.sqrt(2.0 / (height * width * inputs))
            arrays[name] = generator.normal(0, scale, (outputs, inputs, height, width)).astype(np.float32)
        elif name.endswith(("running_var", "bn.weight")):
            arrays[name] = generator.uniform(0.7, 1.4, shape).astype(np.float32)
        else:
            arrays[name] = generator.normal(0, 0.1, shape).astype(np.float32)
    return arrays


def readme_block(marker: str) -> str:
    """The fenced block that follows a comment of README."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```\w+\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None, f"README has no block {marker}"
    return found[1]
