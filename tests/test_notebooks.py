"""The notebooks: stored clean and whole, and run from start to end in their small setting."""

import importlib
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ("beta_and_sigma", "gradients", "quickstart", "scaling", "theory")
COLAB = "https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def _source(cell: dict) -> str:
    return "".join(cell["source"])


def _setup(path: Path) -> str:
    return next(_source(cell) for cell in _cells(path, "code") if "REPOSITORY = " in _source(cell))


def test_the_notebooks_are_there():
    assert tuple(path.stem for path in NOTEBOOKS) == NAMES


@every_notebook
def test_the_first_cell_opens_it_in_colab(path):
    first = json.loads(path.read_text())["cells"][0]
    repository = re.search(r'REPOSITORY = "https://github.com/([\w.-]+/[\w.-]+)"', _setup(path))
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
def test_it_imports_the_library_and_sets_up_like_the_others(path):
    assert "\nimport bsvae_jax as bv\n" in _setup(path)
    assert _setup(path) == _setup(NOTEBOOKS[0])


@every_notebook
def test_what_it_imports_is_there(path):
    """Running four of the five is slow; a name that has moved is seen at once."""
    imported = re.findall(r"^from (bsvae_jax[\w.]*) import (.+)$", "\n".join(map(_source, _cells(path, "code"))), re.MULTILINE)
    assert imported
    for module, names in imported:
        for name in names.split(","):
            try:
                importlib.import_module(f"{module}.{name.strip()}")
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), name.strip()), f"{module} has no {name.strip()}"


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


@run_from_start_to_end
def test_it_runs(path, tmp_path):
    for cell in _execute(path, tmp_path):
        errors = [output.text for output in cell.outputs if output.get("name") == "stderr"]
        assert not [text for text in errors if "Warning" in text], f"{cell.source[:200]}\n{errors}"


# --- What the setup cell says where something is missing --------------------------------------------------------------


def _run_setup(expect: str = "None") -> None:
    source = _setup(NOTEBOOKS[0])
    assert "\nEXPECT = None " in source
    exec(compile(source.replace("\nEXPECT = None ", f"\nEXPECT = {expect} "), "setup", "exec"), {})


def test_setup_says_where_it_runs(capsys):
    _run_setup()
    assert re.search(r"bsvae_jax [\d.]+, jax [\d.]+: 8 x cpu", capsys.readouterr().out)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_setup_stops_where_an_expected_accelerator_is_missing(platform):
    with pytest.raises(RuntimeError, match=r"accelerator was expected, and JAX runs on 8 x cpu.*Change runtime type"):
        _run_setup(repr(platform))


def test_setup_stops_on_a_machine_whose_accelerator_jax_does_not_use(monkeypatch):
    monkeypatch.setattr(
        "bsvae_jax.distributed.mesh.unused_accelerator", lambda: "; WARNING: this machine has a TPU that JAX does not use"
    )
    with pytest.raises(RuntimeError, match="has a TPU that JAX does not use"):
        _run_setup()


def test_setup_refuses_an_older_jax(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.7.2")
    with pytest.raises(RuntimeError, match=r"This runtime has jax 0\.7\.2; bsvae_jax needs 0\.10 or newer"):
        _run_setup()


def test_setup_installs_without_touching_jax_and_explains_a_failure(monkeypatch, capsys):
    """No package and no network: pip is told to keep jax, and its last words are shown."""
    import importlib.util
    import subprocess

    import jax
    import jaxlib

    found, pinned = importlib.util.find_spec, []

    def run(command, **options):
        pinned.append(Path(command[command.index("-c") + 1]).read_text().split())
        assert command[-1].startswith("git+https://github.com/")
        return subprocess.CompletedProcess(command, 1, "", "ERROR: could not resolve host")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bsvae_jax" else found(name))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"could not be installed .*no network.*pip install -e .*could not resolve host"):
        _run_setup()
    assert {f"jax=={jax.__version__}", f"jaxlib=={jaxlib.__version__}"} <= set(pinned[0])
    assert "left as they are: jax==" in capsys.readouterr().out
