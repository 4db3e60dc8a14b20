"""What is measured of training: counts and ratios by hand; the command that measures an accelerator, on a CPU."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bsvae_jax.config import MLP, Config
from bsvae_jax.data import DataShape
from bsvae_jax.profiling import benchmark

COMMAND = Path(__file__).parents[1] / "benchmarks" / "accelerator.py"
TINY = Config(network=MLP((8,)), latent_size=2, batch_size=4, devices=1, steps_per_dispatch=2)


def run(folder, *rows):
    command = [sys.executable, COMMAND, "--quick", "--out", folder, "--only", ",".join(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, json.loads((folder / "accelerator.json").read_text())


def test_the_time_that_a_device_works_is_that_of_overlapping_kernels_once():
    assert benchmark._covered([(0.0, 2.0), (1.0, 3.0), (1.5, 2.0), (5.0, 6.0)]) == 4.0


@pytest.mark.long
def test_arithmetic_and_images_of_a_stack_are_those_of_its_members(monkeypatch):
    monkeypatch.setattr(benchmark, "matrix_product_ceiling", lambda precision, platform: 1e12)
    images = benchmark.random_images(DataShape((8, 8, 1), 256, "uint8", 16, 1))
    one = benchmark.measure(TINY, images, 1, 1e-3)
    for execution in ("scan", "vmap"):
        stack = benchmark.measure(TINY, images, 1, 1e-3, 3, execution)
        assert stack.batch_size == 12
        assert stack.step.flops == pytest.approx(3 * one.step.flops, rel=0.1)


@pytest.mark.long
def test_the_table_of_the_paper_takes_its_images_over_the_speed_and_a_missing_row_is_a_failure(tmp_path):
    done, rows = run(tmp_path, "paper-table")
    assert done.returncode == 1
    assert "needs the row mnist-float32" in rows["paper-table"]["failed"]
    (tmp_path / "accelerator.json").write_text(json.dumps({"mnist-float32": {"images_per_second": [1e5, 1e5, 9e5]}}))
    done, rows = run(tmp_path, "paper-table")
    assert (done.returncode, rows["paper-table"]["minutes"]) == (0, pytest.approx(5.0))  # 10 x 50 x 60,000 / 1e5 / 60
    assert "5.0 minutes for 10 members" in (tmp_path / "accelerator.md").read_text()


@pytest.mark.slow
def test_objective_and_gradients_of_every_kind_are_those_of_the_cpu(tmp_path):
    done, rows = run(tmp_path, "invariance")
    assert done.returncode == 0, done.stdout
    assert len(rows["invariance"]["errors"]) == 4


@pytest.mark.parametrize(
    ("program", "timeout", "expected"),
    [
        ("print('{\"images_per_second\": [3.0, 1.0, 2.0]}')", 100.0, (2.0, "")),
        ("raise RuntimeError('no such layout')", 100.0, (0.0, "RuntimeError: no such layout")),
        ("raise RuntimeError('no such layout\\n\\nSet CHECK=1 to see more.')", 100.0, (0.0, "RuntimeError: no such layout")),
        ("import os; os.abort()", 100.0, (0.0, "exit status -6")),
        ("import time; time.sleep(600)", 1.0, (0.0, "no speed in 1 s")),
    ],
)
def test_a_setting_of_pytorch_that_fails_is_a_row(program, timeout, expected, tmp_path, monkeypatch):
    """Crashes and stalls included: each is a process of its own."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c {shlex.quote(program)}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    found = benchmark._torch_speed("2.14", {"layout": "contiguous", "mode": "default"}, timeout)
    assert (found.median, found.failure) == expected
    assert found.setting == "contiguous, compiled (default)"
