"""The shape of the package: imports point down, importing touches no device, training never needs TensorFlow."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import bsvae_jax

PACKAGE = Path(bsvae_jax.__file__).parent

# From the ground up; a package may import itself and only packages of earlier rows.
ORDER = [
    ["errors"],
    ["_io", "theory", "random"],
    ["objective"],
    ["distributed"],
    ["models", "data"],
    ["config"],
    ["evaluation"],
    ["training"],
    ["profiling", "sweeps"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def _room(path: Path) -> str:
    """The entry directly under the package that a file belongs to."""
    first = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "" if first == "__init__" else first


def _imports(path: Path) -> set[str]:
    """Entries directly under the package that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bsvae_jax":
            parts = (node.module or "").split(".")[1:]
            found |= {parts[0]} if parts else {a.name if a.name in LEVEL else "" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {f"{a.name}.".split(".")[1] for a in node.names if a.name.split(".")[0] == "bsvae_jax"}
    return found


def test_imports_point_down():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        room = _room(path)
        if room in ("", "__main__"):  # the public names, which are imported when they are used, and the command line
            assert _imports(path) <= {"cli"} - {room}
            continue
        assert room in LEVEL, f"{room} has no place in ORDER"
        upward += [
            f"{path.relative_to(PACKAGE)} -> {name}" for name in _imports(path) - {room, ""} if LEVEL[name] >= LEVEL[room]
        ]
    assert not upward, f"arrows that point up: {upward}"


def test_the_walk_sees_imports():
    """The test above could pass by seeing nothing."""
    assert {"objective", "config", "data"} <= _imports(PACKAGE / "training" / "step.py")
    assert _imports(PACKAGE / "theory.py") <= {"errors"}


def test_the_house_stays_small():
    """At most 14 entries beside the package's own files, and no file above 450 lines."""
    own = {"__init__.py", "__init__.pyi", "__main__.py", "py.typed", "__pycache__"}
    assert len({path.name for path in PACKAGE.iterdir()} - own) <= 14
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {name: count for name, count in lines.items() if count > 450}


def test_importing_touches_no_device_and_no_tensorflow():
    # With a platform that does not exist, the first touch of a device raises.
    code = (
        "import sys, bsvae_jax, bsvae_jax.cli.main, bsvae_jax.evaluation.figures, bsvae_jax.evaluation.evaluate\n"
        "assert 'tensorflow' not in sys.modules and 'tensorflow_datasets' not in sys.modules\n"
        "import jax\n"
        "try: jax.devices()\n"
        "except RuntimeError: print('untouched')\n"
    )
    environment = {"JAX_PLATFORMS": "no_such_platform", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "untouched", result.stderr


HEAVY = ("matplotlib", "orbax", "tensorboardX", "sklearn", "tensorflow_datasets", "dm_pix", "pandas", "scipy", "tensorflow")


def _loaded(code: str) -> set[str]:
    """The packages that are loaded in a fresh process after `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_the_package_is_light():
    assert not _loaded("import bsvae_jax") & {*HEAVY, "jax", "flax", "optax"}
    loaded = _loaded("import bsvae_jax as bv; bv.Config(), bv.elbo_terms, bv.VAE")
    assert "jax" in loaded
    assert not loaded & set(HEAVY)


def test_help_needs_no_jax():
    code = "import bsvae_jax.cli.main as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass"
    assert not _loaded(code) & {*HEAVY, "jax", "flax", "optax", "tyro", "numpy"}


def test_a_wrong_option_is_answered_with_few_imports():
    """Of a command with a config file: besides JAX, Flax and the parser only what its classes are made of."""
    config = PACKAGE.parent / "configs" / "digits.py"
    for arguments in (["train", str(config), "--no-such-option", "1"], ["sweep", str(config), "--epochs", "abc"]):
        loaded = _loaded(f"import bsvae_jax.cli.main as cli\ntry: cli.main({arguments})\nexcept SystemExit: pass")
        assert {"jax", "flax", "tyro"} <= loaded
        assert not loaded & {*HEAVY, "optax", "PIL", "tqdm", "psutil", "pooch"}


def test_public_names_are_declared_once():
    """`__init__.pyi` says both what a type checker sees and what is imported when it is used."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    (declared,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert set(bsvae_jax.__all__) == imported == set(declared)
    assert all(getattr(bsvae_jax, name) is not None for name in imported)
    assert {"models", "data", "training", "evaluation", "sweeps", "objective", "fit", "Config"} <= imported


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
