"""Several real processes on this machine, over gloo: the same numbers as one, one writer, sentences where they disagree."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import bsvae_jax as bv
from bsvae_jax._io.files import read_metrics
from bsvae_jax.config import MLP, Config
from bsvae_jax.distributed import multihost
from bsvae_jax.distributed.preemption import Stop
from bsvae_jax.errors import UserError
from bsvae_jax.training.trainer import Trainer

CONFIG = """
import bsvae_jax as bv
from bsvae_jax.config import MLP
def get_config():
    return bv.Config(network=MLP((16,)), latent_size=3, batch_size=104, epochs={epochs}, steps_per_dispatch=5)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(tmp_path: Path, options: list[list[str]], epochs: int = 2, devices: int = 2) -> list[subprocess.Popen]:
    """A process of `bsvae train` for each list of options: output in `out_0`, `out_1`, ..., workdirs `run_0`, `run_1`, ..."""
    config, port = tmp_path / "small.py", free_port()
    config.write_text(CONFIG.format(epochs=epochs))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    processes = []
    for index, also in enumerate(options):
        place = ["--coordinator", f"localhost:{port}", "--processes", str(len(options)), "--process", str(index)]
        command = [sys.executable, "-m", "bsvae_jax", "train", str(config), "--workdir", str(tmp_path / f"run_{index}"), *place]
        with (tmp_path / f"out_{index}").open("w") as out:
            processes.append(subprocess.Popen([*command, *also], env=environment, stdout=out, stderr=subprocess.STDOUT))
    return processes


def outcome(tmp_path: Path, processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str]]:
    """Exit status and output of each process; none is left running."""
    end = time.monotonic() + seconds
    try:
        statuses = [process.wait(max(1.0, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(status, (tmp_path / f"out_{index}").read_text()) for index, status in enumerate(statuses)]


def small(epochs: int = 2) -> Config:
    return Config(network=MLP((16,)), latent_size=3, batch_size=104, epochs=epochs, steps_per_dispatch=5, devices=4)


def assert_same_parameters(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def objectives(folder: Path) -> list[float]:
    return [row["objective"] for row in read_metrics(folder)]


def test_two_processes_train_as_one_and_only_one_of_them_writes(tmp_path):
    alone = bv.fit(small(), tmp_path / "alone", progress=False)
    found = outcome(tmp_path, start(tmp_path, [[], []]))
    assert [status for status, _ in found] == [0, 0], found
    assert "4 x cpu (cpu) in 2 processes" in found[0][1]
    assert not (tmp_path / "run_1").exists()
    assert_same_parameters(bv.restore(tmp_path / "run_0").variables, alone.state.variables())
    np.testing.assert_allclose(objectives(tmp_path / "run_0"), objectives(tmp_path / "alone"), rtol=1e-6)


def test_streamed_images_reach_every_process(tmp_path):
    alone = bv.fit(small(), tmp_path / "alone", progress=False)
    found = outcome(tmp_path, start(tmp_path, [["--resident-memory", "0.0"]] * 2))
    assert [status for status, _ in found] == [0, 0], found
    assert_same_parameters(bv.restore(tmp_path / "run_0").variables, alone.state.variables())


def saved(folder: Path) -> int:
    """The newest step with a checkpoint, of a run that goes on meanwhile."""
    found = folder / "checkpoints"
    return max((int(path.name) for path in found.iterdir() if path.name.isdigit()), default=0) if found.is_dir() else 0


def stop_after(tmp_path: Path, processes: list[subprocess.Popen], step: int) -> list[tuple[int, str]]:
    """SIGTERM to the first process once there is a checkpoint of this step or a later one."""
    end = time.monotonic() + 200
    while saved(tmp_path / "run_0") < step and time.monotonic() < end:
        time.sleep(0.1)
    processes[0].send_signal(signal.SIGTERM)
    return outcome(tmp_path, processes)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices_and_processes(tmp_path):
    """Begun on 4 devices, continued by two processes of 2, ended on 8: the parameters are those of one device."""
    assert stop_after(tmp_path, start(tmp_path, [[]], epochs=40, devices=4), 30)[0][0] == 143
    first = saved(tmp_path / "run_0")
    assert [status for status, _ in stop_after(tmp_path, start(tmp_path, [[], []], epochs=40), first + 15)] == [143, 143]
    assert first < saved(tmp_path / "run_0") < 600
    config = bv.load_config(tmp_path / "small.py")
    ended = bv.fit(config, tmp_path / "run_0", progress=False)
    alone = bv.fit(dataclasses.replace(config, devices=1), tmp_path / "alone", progress=False)
    parameters = jax.device_get((ended.state.params, alone.state.params))
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), *parameters)
    assert max(jax.tree.leaves(difference)) < 2e-3  # 600 steps of Adam on sums in another order
    np.testing.assert_allclose(objectives(tmp_path / "run_0")[-1], objectives(tmp_path / "alone")[-1], rtol=1e-3)


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_process_stops_both_and_saves(tmp_path, asked):
    processes = start(tmp_path, [[], []], epochs=2000)
    end = time.monotonic() + 200
    while not (tmp_path / "run_0" / "checkpoints" / "15").is_dir() and time.monotonic() < end:
        time.sleep(0.2)
    processes[asked].send_signal(signal.SIGTERM)
    found = outcome(tmp_path, processes)
    assert [status for status, _ in found] == [143, 143], found
    assert "stopped after step" in found[0][1]
    steps = [int(path.name) for path in (tmp_path / "run_0" / "checkpoints").iterdir() if path.name.isdigit()]
    assert f"stopped after step {max(steps)} of 28847" in found[0][1]


def test_a_signal_during_the_agreement_counts_at_the_next_one(monkeypatch):
    """The others have been told that there was none, and wait for this process in the next step."""
    stop = Stop()

    def anywhere(flag):
        stop.number = signal.SIGTERM
        return flag

    monkeypatch.setattr(multihost, "anywhere", anywhere)
    trainer = SimpleNamespace(stop=stop)
    assert not Trainer._stopping(trainer)
    assert Trainer._stopping(trainer)


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_a_process_that_dies_takes_the_other_with_it_at_once(tmp_path, killed):
    """A minute is allowed. Where process 0 dies, JAX notices as soon, and may be the one to end the other."""
    processes = start(tmp_path, [[], []], epochs=2000)
    end = time.monotonic() + 200
    while not (tmp_path / "run_0" / "checkpoints" / "15").is_dir() and time.monotonic() < end:
        time.sleep(0.2)
    processes[killed].kill()
    begun = time.monotonic()
    status, text = outcome(tmp_path, processes, seconds=100)[1 - killed]
    print(f"the other process ended after {time.monotonic() - begun:.1f} s with status {status}")
    assert time.monotonic() - begun < 60
    sentence = f"error: Process {killed} has ended without a word" in text
    assert (status == 1 and sentence) or (killed == 0 and "another task died" in text), (status, text)


def test_processes_with_different_configs_are_told_in_what(tmp_path):
    found = outcome(tmp_path, start(tmp_path, [["--beta", "1"], ["--beta", "2"]]))
    for status, text in found:
        assert status == 2
        assert "do not have the same config (beta: 1.0 in process 0, 2.0 in process 1)" in text
    assert not (tmp_path / "run_0").exists()


def test_what_the_writer_refuses_ends_the_others(tmp_path):
    (tmp_path / "run_0").write_text("a file")
    (first, refused), (second, text) = outcome(tmp_path, start(tmp_path, [[], []]))
    assert (first, second) == (2, 2)
    assert "is a file; --workdir must name a folder" in refused
    assert "Process 0 has stopped; its message says why" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", 2, 0), "coordinator must be HOST:PORT, got 'nowhere'"),
        (("localhost:123456", 2, 0), "coordinator must be HOST:PORT"),
        (("localhost:1234", 2, 2), r"which of them this is \(0 ... number - 1\) must be given; got 2 and 2"),
        (("localhost:1234", None, None), "must be given; got None and None"),
        ((None, 2, 0), "A number of processes is for a coordinator"),
        ((None, None, None), "does not look like a process of a cluster that JAX knows"),
    ],
)
def test_places_that_make_no_sense_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    with pytest.raises(UserError, match=message):
        multihost.join(*arguments)


def no_cluster(*arguments, **options):
    raise ValueError("coordinator_address should be defined.")


def test_a_coordinator_that_cannot_be_reached_is_a_sentence_in_time(tmp_path):
    code = (
        "from bsvae_jax.distributed import multihost as hosts\nfrom bsvae_jax.errors import UserError\n"
        f"try: hosts.join('localhost:{free_port()}', 2, 1, timeout=3)\n"
        "except UserError as error: print(error)\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    begun = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert time.monotonic() - begun < 60
    assert "Process 0 was not reached at localhost:" in found.stdout, (found.stdout, found.stderr)


def test_one_process_alone_asks_nobody():
    assert multihost.alone()
    assert multihost.is_writer()
    assert multihost.anywhere(True)
    assert not multihost.anywhere(False)
    multihost.check_agreement("config", {"beta": 1.0}, "")
    tree = {"a": np.ones(2)}
    assert multihost.from_writer(tree) is tree
    assert json.dumps(multihost.in_writer(lambda: [1], [2])) == "[1]"
