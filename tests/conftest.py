"""Strict numerics for every test: eight fake CPU devices, no implicit rank promotion, warnings as errors.

Set before any test imports a backend. Real image files, where a checkout has them beside it, are offered as a fixture.
"""

import functools
import gc
import http.server
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest

# Hundreds of programs are compiled here and run for a moment: with the code generator's least effort it takes half the time,
# and a third of that with the generator that came before the one for MLIR, which XLA has had to JAX 0.10.
# `XLA_FLAGS= python -m pytest` runs what users run.
FLAGS = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile the same programs again and again. Within one run of pytest they are compiled once: its workers, and the
# processes that tests start, inherit the folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="bsvae_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def pytest_collection_finish() -> None:
    """Thousands of collected tests stay to the end: the garbage collector need not go through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of a test is found in the cache of another, or in the user's."""
    monkeypatch.setenv("BSVAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


FILES = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    """What was compiled serves four files; kept for all of them it would take gigabytes in the end."""
    yield
    if next(FILES) % 4 == 0:
        jax.clear_caches()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder whose files are on the network, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


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
