"""Files that are read as JSON and written whole: nonsense is told in a sentence, and what a kill leaves goes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bsvae_jax._io.files import is_used, read_json, read_metrics, take_folder, write_arrays, write_atomically
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.metrics import from_json
from bsvae_jax.sweeps.info import read_sweep
from bsvae_jax.training.evaluated import read_evaluation
from bsvae_jax.training.stopped import read_failure, read_stopped
from bsvae_jax.training.workdir import read_info, shape_and_levels

NONSENSE = [b"", b"{", b"3", b"[]", b"null", b'"text"', b"{}", b"\xff\xfe{", b"[" * 100_000, b'{"step": 1e999}']
READERS = {
    "config.json": read_info,
    "sweep.json": read_sweep,
    "evaluation.json": read_evaluation,
    "failure.json": read_failure,
    "stopped.json": read_stopped,
}


@pytest.mark.parametrize("content", NONSENSE, ids=range(len(NONSENSE)))
@pytest.mark.parametrize("name", READERS)
def test_nonsense_is_damage(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        READERS[name](tmp_path)


def test_what_the_block_refuses_itself_is_passed_on(tmp_path):
    (tmp_path / "a.json").write_text("[3]")
    with read_json(tmp_path / "a.json") as values:
        assert values == [3]
    with pytest.raises(UserError, match=r"^newer$"), read_json(tmp_path / "a.json"):
        raise UserError("newer")
    with (
        pytest.raises(UserError, match=r"damaged \(IndexError: .*\); delete it\.$"),
        read_json(tmp_path / "a.json", "delete it"),
    ):
        [][1]


@pytest.mark.parametrize("shape", ["28", [], [28.5, 28], [0], ["28"], None, [True]])
def test_no_shape(shape):
    assert shape_and_levels({"image_shape": [28, 28, 1], "levels": 256}) == ((28, 28, 1), 256)
    with pytest.raises(ValueError, match="there are no data of shape"):
        shape_and_levels({"image_shape": shape, "levels": 256})


@pytest.mark.parametrize("levels", [1, 2.5, "256", None, float("inf"), True])
def test_no_levels(levels):
    with pytest.raises(ValueError, match="there are no data of shape"):
        shape_and_levels({"image_shape": [28, 28, 1], "levels": levels})


QUANTITY = {"value": 1.5, "standard_error": None, "unit": "nats", "meaning": "a rate"}


@pytest.mark.parametrize("change", [{"value": "x"}, {"value": None}, {"standard_error": []}, {"unit": 3}, {"more": 1}])
def test_no_quantity(change):
    assert from_json({"test": {"rate": QUANTITY}})["test"]["rate"].value == 1.5
    with pytest.raises(TypeError):
        from_json({"test": {"rate": QUANTITY | change}})


ROW = {"step": 3, "epoch": 1, "split": "train", "rate": 2.0, "mse": None}
LINES = [b"3", b"[]", b"\xff", b"[" * 100_000, b"{"]
LINES += [
    json.dumps(ROW | change).encode()
    for change in ({"step": "3"}, {"step": -1}, {"rate": "x"}, {"split": 1}, {"epoch": []}, {"steps": None})
]
LINES += [
    json.dumps({name: value for name, value in ROW.items() if name != left}).encode() for left in ("step", "epoch", "split")
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_no_row(line, tmp_path):
    good = json.dumps(ROW).encode()
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("torn", [b"", b'{"step": 4', b'{"split": "\xc3'])
def test_a_torn_last_row_is_left_out(torn, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n" + torn)
    assert read_metrics(tmp_path) == [ROW]


def test_a_system_without_locks_is_named():
    code = "import sys; sys.modules['fcntl'] = None; import bsvae_jax; bsvae_jax.read_metrics"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.splitlines()[-1].startswith("ImportError: bsvae_jax runs on Linux and macOS; on Windows, in WSL")


@pytest.mark.long
def test_what_a_kill_leaves_is_swept(tmp_path):
    """By the next command that takes the folder, or that writes the same file; what a living process writes stays."""
    killed = "import bsvae_jax._io.files as f, os, pathlib, sys\nf.os.fsync = lambda file: os._exit(9)\n"
    killed += "f.write_atomically(pathlib.Path(sys.argv[1]), b'half')"
    for name in ("table.csv", "a[b].npz"):
        subprocess.run([sys.executable, "-c", killed, str(tmp_path / name)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    assert not is_used(tmp_path)
    living = tmp_path / f".config.json.{os.getppid()}.part"
    living.touch()
    for other in (".a.b.part", ".lock", "3.part", ".x.99999999999999999999.part"):
        (tmp_path / other).touch()
    before = {path.name for path in tmp_path.iterdir()}
    write_arrays(tmp_path / "a[b].npz", path=np.arange(3))
    assert {path.name for path in tmp_path.iterdir()} - before == {"a[b].npz"}
    assert len(before - {path.name for path in tmp_path.iterdir()}) == 1
    take_folder(tmp_path, "testing").close()
    left = {".a.b.part", ".lock", "3.part", ".x.99999999999999999999.part", living.name, "a[b].npz"}
    assert {path.name for path in tmp_path.iterdir()} == left
    np.testing.assert_array_equal(np.load(tmp_path / "a[b].npz")["path"], [0, 1, 2])
    write_atomically(tmp_path / "table.csv", b"whole")
    assert (tmp_path / "table.csv").read_bytes() == b"whole"
