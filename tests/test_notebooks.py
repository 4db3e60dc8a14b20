"""The notebooks: stored clean and whole, and run from start to end in their small setting."""

import ast
import importlib.util
import json
import os
import re
import types
from pathlib import Path

import pytest

import bsvae_jax as bv

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ("beta_and_sigma", "gradients", "priors", "quickstart", "scaling", "theory")
COLAB = "https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def _source(cell: dict) -> str:
    return "".join(cell["source"])


def _setup(path: Path) -> str:
    return next(_source(cell) for cell in _cells(path, "code") if 'find_spec("bsvae_jax")' in _source(cell))


def test_the_notebooks_are_there():
    assert tuple(path.stem for path in NOTEBOOKS) == NAMES


@every_notebook
def test_the_first_cell_opens_it_in_colab(path):
    first = json.loads(path.read_text())["cells"][0]
    repository = re.search(r'install -q git\+https://github.com/([\w.-]+/[\w.-]+)"', _setup(path))
    assert repository is not None
    assert first["cell_type"] == "markdown"
    assert f"]({COLAB.format(repository=repository[1], name=path.stem)})" in _source(first)


@every_notebook
def test_it_is_stored_with_clean_outputs(path):
    assert path.stat().st_size < 1_000_000, "too large to read on GitHub"
    text = path.read_text()
    notebook = json.loads(text)
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info", "colab"}
    outputs = []
    for number, cell in enumerate(_cells(path, "code"), 1):
        assert cell["execution_count"] == number, "not run from start to end"
        assert cell["metadata"] == {}
        outputs += cell["outputs"]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"], "progress bars or warnings"
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for stray in ("Warning", "widget-view", "/home/", "/tmp/", "/root/", "/Users/", "site-packages", "images/s", "@@"):
        assert stray not in text, stray


@every_notebook
def test_it_sets_up_in_four_lines_like_the_others(path):
    assert len([line for line in _setup(path).splitlines() if line]) == 4
    assert "\nimport bsvae_jax as bv\n" in _setup(path)
    assert _setup(path) == _setup(NOTEBOOKS[0])


def _names_of_the_library(source: str) -> set[str]:
    """Dotted names of the package that code imports or uses: `bsvae_jax.sweeps.COLORS`."""
    tree = ast.parse(source)
    local, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias for alias in node.names if alias.name.split(".")[0] == "bsvae_jax"]
            local |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in modules}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bsvae_jax":
            local |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in local:
            found.add(".".join([local[node.id], *reversed(parts)]))
    return found | set(local.values())


@every_notebook
def test_what_it_uses_of_the_library_is_there_and_public(path):
    """Running all but one is slow; a name that has moved is seen at once."""
    code = "\n".join(line for cell in _cells(path, "code") for line in _source(cell).splitlines() if not line.startswith("%"))
    names = _names_of_the_library(code)
    assert {"bsvae_jax.distributed.describe_devices", "bsvae_jax.Config"} <= names
    for name in names - {"bsvae_jax.__version__"}:
        value = bv
        for part in name.split(".")[1:]:
            public = isinstance(value, types.ModuleType) and getattr(value, "__all__", None)
            assert not part.startswith("_"), f"{name} is private"
            assert not public or part in public, f"{name} is not among the public names of {value.__name__}"
            value = getattr(value, part)


def test_names_of_the_library_are_found():
    """The test above could pass by seeing nothing."""
    source = "import bsvae_jax as bv\nfrom bsvae_jax.sweeps import COLORS as C, plots\nbv.training.fit.fit(C[0], plots._draw)"
    used = {"bsvae_jax.training.fit.fit", "bsvae_jax.sweeps.COLORS", "bsvae_jax.sweeps.plots._draw"}
    assert used <= _names_of_the_library(source)


def _execute(path: Path, folder: Path) -> list[dict]:
    pytest.importorskip("ipykernel", reason="pip install -e '.[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebooks]'")
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[notebooks]'")
    notebook = nbformat.read(path, as_version=4)
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(search), "JAX_PLATFORMS": "cpu", "BSVAE_NOTEBOOK_SMALL": "1"}
    client = nbclient.NotebookClient(
        notebook, timeout=540, kernel_name="python3", resources={"metadata": {"path": str(folder)}}, record_timing=False
    )
    client.execute(env=os.environ | environment)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


SHORT = {"theory"}  # 20 seconds; the others take up to a minute each

run_from_start_to_end = pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[] if path.stem in SHORT else pytest.mark.slow, id=path.stem) for path in NOTEBOOKS]
)


@pytest.mark.long
@run_from_start_to_end
def test_it_runs(path, tmp_path):
    for cell in _execute(path, tmp_path):
        errors = [output.text for output in cell.outputs if output.get("name") == "stderr"]
        assert not [text for text in errors if "Warning" in text], f"{cell.source[:200]}\n{errors}"


def test_setup_says_where_it_runs(capsys):
    exec(compile(_setup(NOTEBOOKS[0]), "setup", "exec"), {})
    assert re.fullmatch(r"bsvae_jax [\d.]+: 8 x cpu \(cpu\)\n", capsys.readouterr().out)


def test_setup_installs_what_is_missing(monkeypatch):
    found, asked = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bsvae_jax" else found(name))
    shell = types.SimpleNamespace(run_line_magic=lambda *arguments: asked.append(arguments))
    exec(compile(_setup(NOTEBOOKS[0]), "setup", "exec"), {"get_ipython": lambda: shell})
    assert asked == [("pip", "install -q git+https://github.com/bsvae-jax/bsvae_jax")]
