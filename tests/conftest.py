"""Strict numerics for every test: eight fake CPU devices, no implicit rank promotion, warnings as errors.

Set before any test imports a backend. Real image files, where a checkout has them beside it, are offered as a fixture.
"""

import tempfile
from pathlib import Path

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile the same programs again and again; within one run of pytest they are compiled once.
_COMPILED = tempfile.TemporaryDirectory(prefix="bsvae_compiled_")
jax.config.update("jax_compilation_cache_dir", _COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def mnist_folder() -> Path:
    folder = DATA / "mnist"
    if not folder.is_dir():
        pytest.skip("the real MNIST files are not beside this checkout")
    return folder


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user runs: without it the type checker objects before the package's own sentence is reached."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
