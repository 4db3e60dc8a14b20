"""The shape of the package: imports point down, importing touches no device, training never needs TensorFlow."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import bsvae_jax

PACKAGE = Path(bsvae_jax.__file__).parent

# From the ground up; a module may import only modules of lower layers. One layer a line.
LAYERS = [
    ["errors", "figures", "footprint", "interruption"],
    ["chips", "hosts"],
    ["files", "space", "events", "lifeline"],
    ["objective", "theory", "randomness", "sweep_figures", "evaluation_figures", "torchfile", "fid", "downloads"],
    ["objective", "theory", "randomness", "sweep_figures", "evaluation_figures", "torchfile", "fid", "downloads"],
    ["config", "layers", "flow_matching"],
    ["convolutions"],
    ["spatial", "velocity", "grid"],
    ["networks", "priors"],
    ["spatial", "velocity", "grid"],
    ["networks", "priors"],
    ["model", "weights"],
    ["data.images", "data.decoding", "data.idx", "data.order", "data.augmentation", "parallel", "checkpoint"],
    ["data.encoded", "data.workers"],
    ["data.prepared", "data.builders"],
    ["data.sources"],
    ["features"],
    ["data", "inception"],
    ["pipeline"],
    ["scoring", "gallery", "likelihood", "aggregate", "neighbours", "densities"],
    ["summary", "details", "follower"],
    ["diagnosis"],
    ["rundir"],
    ["training"],
    ["program", "failure"],
    ["trainer"],
    ["loading", "sweep", "importing", "flow_training"],
    ["results"],
    ["report"],
    ["sampling", "pictures", "exporting", "fitting"],
    ["compiling"],
    ["benchmark"],
    ["feature_statistics", "lenet"],
    ["evaluation"],
    ["evaluation_pictures"],
    [""],  # the package itself: the public names
    ["cli"],
    ["__main__"],
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bsvae_jax":
            base = (node.module or "").removeprefix("bsvae_jax").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                found.add(name if name in LEVEL else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("bsvae_jax").lstrip(".") for a in node.names if a.name.split(".")[0] == "bsvae_jax"}
    return found


def test_imports_point_down():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        module = _module(path)
        assert module in LEVEL, f"{module} has no place in LAYERS"
        upward += [f"{module} -> {name}" for name in _imports(path) if LEVEL[name] >= LEVEL[module]]
    assert not upward, f"arrows that point up: {upward}"


def test_the_walk_sees_imports():
    """The test above could pass by seeing nothing."""
    assert {"objective", "config", "data.images"} <= _imports(PACKAGE / "trainer.py") | _imports(PACKAGE / "training.py")
    assert _imports(PACKAGE / "figures.py") == set()


def test_importing_touches_no_device_and_no_tensorflow():
    # With a platform that does not exist, the first touch of a device raises.
    code = (
        "import sys, bsvae_jax, bsvae_jax.cli, bsvae_jax.pictures, bsvae_jax.evaluation\n"
        "assert 'tensorflow' not in sys.modules and 'tensorflow_datasets' not in sys.modules\n"
        "import jax\n"
        "try: jax.devices()\n"
        "except RuntimeError: print('untouched')\n"
    )
    environment = {"JAX_PLATFORMS": "no_such_platform", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "untouched", result.stderr


def test_only_public_names_of_jax_are_imported():
    private = [
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if "jax._src" in line or "flax._src" in line or "optax._src" in line or "orbax.checkpoint._src" in line
    ]
    assert not private


def test_every_public_function_and_class_has_an_example():
    public = {f"bsvae_jax.{name}": getattr(bsvae_jax, name) for name in bsvae_jax.__all__}
    public |= {f"bsvae_jax.data.{name}": getattr(bsvae_jax.data, name) for name in bsvae_jax.data.__all__}
    # `theory` has no __all__: what it defines itself, but for private names and aliases of types.
    theory = {name: value for name, value in vars(bsvae_jax.theory).items() if not name.startswith("_")}
    public |= {f"bsvae_jax.theory.{n}": v for n, v in theory.items() if getattr(v, "__module__", "") == "bsvae_jax.theory"}
    described = {name: value for name, value in public.items() if inspect.isroutine(value) or inspect.isclass(value)}
    assert {"bsvae_jax.fit", "bsvae_jax.data.ImageSet", "bsvae_jax.theory.linear_optimum"} <= set(described)
    assert not [name for name, value in described.items() if ">>>" not in (value.__doc__ or "")]
