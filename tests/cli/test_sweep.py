"""`bsvae sweep`: the devices that it gives JAX on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bsvae_jax.cli import main
from bsvae_jax.cli import sweep as command
from bsvae_jax.sweeps.fit_sweep import SweepResult

CONFIGS = Path(__file__).parents[2] / "configs"
MAKE = "import jax; from bsvae_jax.cli import sweep; {before}sweep._make_a_device_of_each_core(); print(jax.device_count())"


@pytest.mark.long
@pytest.mark.parametrize(
    ("environment", "before", "devices"),
    [
        ({}, "", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        ({"JAX_NUM_CPU_DEVICES": "3"}, "", 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, "", 5),
        ({}, "jax.devices(); ", 1),  # too late to have others
    ],
)
def test_a_device_of_each_core_unless_the_user_said_how_many(environment, before, devices):
    own = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    code = [sys.executable, "-c", MAKE.format(before=before)]
    done = subprocess.run(code, env={**own, "JAX_PLATFORMS": "cpu", **environment}, capture_output=True, text=True, check=True)
    assert int(done.stdout) == devices


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ("digits.py", [], True),
        ("digits.py", ["--execution", "vmap"], True),
        ("digits.py", ["--execution", "loop"], False),
        ("mnist.py", [], False),  # convolutions: members take turns, each with all cores
        ("mnist.py", ["--execution", "scan"], True),
    ],
)
def test_members_side_by_side_have_a_device_of_each_core(config, options, expected, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(command, "_make_a_device_of_each_core", lambda: made.append(True))
    monkeypatch.setattr(command, "print_report", lambda folder: None)
    monkeypatch.setattr("bsvae_jax.sweeps.fit_sweep.fit_sweep", lambda *_, **__: SweepResult(tmp_path, [], {}))
    main.main(["sweep", str(CONFIGS / config), "--workdir", str(tmp_path), *options])
    assert bool(made) == expected
