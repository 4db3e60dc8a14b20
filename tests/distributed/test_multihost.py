"""Several real processes on this machine, over gloo: the same numbers as one, one writer, sentences where they disagree."""

import concurrent.futures
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
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
from bsvae_jax.training.callbacks import Callbacks
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


def start(
    tmp_path: Path, options: list[list[str]], epochs: int = 2, devices: int = 2, code: Mapping[int, str] | None = None
) -> list[subprocess.Popen]:
    """A process of `bsvae train` for each list of options: output in `out_0`, `out_1`, ..., workdirs `run_0`, `run_1`, ...

    Processes that have `code` run that in place of the command line's own.
    """
    config, port = tmp_path / "small.py", free_port()
    config.write_text(CONFIG.format(epochs=epochs))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    processes = []
    for index, also in enumerate(options):
        place = ["--coordinator", f"localhost:{port}", "--processes", str(len(options)), "--process", str(index)]
        program = ["-c", code[index]] if code and index in code else ["-m", "bsvae_jax"]
        command = [sys.executable, *program, "train", str(config), "--workdir", str(tmp_path / f"run_{index}"), *place]
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


@pytest.mark.long
def test_two_processes_train_as_one_and_only_one_of_them_writes(tmp_path):
    alone = bv.fit(small(), tmp_path / "alone", progress=False)
    found = outcome(tmp_path, start(tmp_path, [[], []]))
    assert [status for status, _ in found] == [0, 0], found
    assert "4 x cpu (cpu) in 2 processes" in found[0][1]
    assert not (tmp_path / "run_1").exists()
    assert_same_parameters(bv.restore(tmp_path / "run_0").variables, alone.state.variables())
    np.testing.assert_allclose(objectives(tmp_path / "run_0"), objectives(tmp_path / "alone"), rtol=1e-6)


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_process_stops_both_and_saves(tmp_path, asked):
    processes = start(tmp_path, [[], []], epochs=2000)
    wait_for_a_checkpoint(tmp_path)
    processes[asked].send_signal(signal.SIGTERM)
    found = outcome(tmp_path, processes)
    assert [status for status, _ in found] == [143, 143], found
    assert "stopped after step" in found[0][1]
    steps = [int(path.name) for path in (tmp_path / "run_0" / "checkpoints").iterdir() if path.name.isdigit()]
    assert f"stopped after step {max(steps)} of 25962" in found[0][1]


def test_a_signal_during_the_agreement_counts_at_the_next_one(monkeypatch):
    """The others have been told that there was none, and wait for this process in the next step."""
    stop = Stop()

    def in_any_process(*flags):
        stop.number = signal.SIGTERM
        return flags

    monkeypatch.setattr(multihost, "in_any_process", in_any_process)
    trainer = SimpleNamespace(stop=stop, callbacks=Callbacks([]), _asked={})
    assert not any(Trainer._requests(trainer))
    assert Trainer._requests(trainer) == (True, False, False)


def wait_for_a_checkpoint(tmp_path):
    """Of step 15 or later: only the latest two and the best are kept, and a fast run deletes one between two looks."""
    end = time.monotonic() + 200
    steps = lambda: [int(path.name) for path in (tmp_path / "run_0" / "checkpoints").glob("*") if path.name.isdigit()]  # noqa: E731
    while max(steps(), default=0) < 15 and time.monotonic() < end:
        time.sleep(0.2)


@pytest.mark.long
@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_a_process_that_dies_ends_the_other_within_a_minute(tmp_path, killed):
    """JAX's heartbeat does, with its C++ stack, and the sentence comes from the shell that outlives the process.

    A process that is exchanging something in that moment finds the connection closed instead.
    """
    processes = start(tmp_path, [[], []], epochs=2000)
    wait_for_a_checkpoint(tmp_path)
    processes[killed].kill()
    begun = time.monotonic()
    status, text = outcome(tmp_path, processes, seconds=100)[1 - killed]
    seconds = time.monotonic() - begun
    print(f"the other process ended after {seconds:.1f} s with status {status}")
    assert seconds < 60
    if status in (1, 2):  # 1 where the end of its own process is not waited for
        assert text.strip().splitlines()[-1].startswith("error: The connection to another process is closed")
        return
    assert status == -signal.SIGABRT, text
    end = time.monotonic() + 10  # the shell may be a moment later
    while f"error: Process {1 - killed} has ended suddenly" not in text and time.monotonic() < end:
        text = (tmp_path / f"out_{1 - killed}").read_text()
        time.sleep(0.1)
    last = text.strip().splitlines()[-1]
    assert last.startswith(f"error: Process {1 - killed} has ended suddenly: it was killed")
    assert "another process has ended and JAX, whose lines are above, ended this one" in last


ALONE = """
import sys
from bsvae_jax.training.callbacks import Callbacks
from bsvae_jax.training.trainer import Trainer
from bsvae_jax.cli import main
epoch, calls = Trainer._epoch, []
def fail(self, *arguments):
    calls.append(1)
    if len(calls) == 3:
        raise OSError(5, "of this process alone")
    return epoch(self, *arguments)
Trainer._epoch = fail
main.main(sys.argv[1:])
"""


@pytest.mark.long
@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.faults), 1])
def test_an_error_of_one_process_ends_the_other_within_a_minute(tmp_path, failing):
    processes = start(tmp_path, [[], []], epochs=2000, code={failing: ALONE})
    processes[failing].wait(240)
    begun = time.monotonic()
    found = outcome(tmp_path, processes, seconds=100)
    print(f"the other process ended {time.monotonic() - begun:.1f} s later with status {found[1 - failing][0]}")
    assert time.monotonic() - begun < 60
    status, text = found[failing]
    assert status in (1, 2), text
    assert "error: [Errno 5] of this process alone" in text
    assert "has ended suddenly" not in text
    assert found[1 - failing][0] not in (0, None)


@pytest.mark.long
def test_processes_with_different_configs_are_told_in_what(tmp_path):
    found = outcome(tmp_path, start(tmp_path, [["--beta", "1"], ["--beta", "2"]]))
    for status, text in found:
        assert status == 2
        assert "do not have the same config (beta: 1.0 in process 0, 2.0 in process 1)" in text
    assert not (tmp_path / "run_0").exists()


FEWER = """
import os, sys
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
from bsvae_jax.cli import main
main.main(sys.argv[1:])
"""


@pytest.mark.long
def test_processes_with_different_numbers_of_devices_are_told_so(tmp_path):
    for status, text in outcome(tmp_path, start(tmp_path, [[], []], code={1: FEWER})):
        assert status == 2, text
        assert "All processes need the same number of devices; process 0 has 2, process 1 has 1." in text
    assert not (tmp_path / "run_0").exists()


@pytest.mark.long
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


# --- Before JAX is asked ----------------------------------------------------------------------------------------------


def meet(port, processes, these, timeout=5.0):
    """What the processes `these` of so many say, each in a thread: None where all met, else the sentence."""

    def one(process):
        try:
            if process == 0:
                multihost._gather(port, processes, timeout)
            else:
                multihost._report_to("localhost", port, processes, process, timeout)
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(one, these))


def test_processes_meet_and_leave_the_port_free():
    port = free_port()
    assert meet(port, 3, [2, 1, 0]) == [None] * 3
    assert meet(port, 3, [0, 1, 2]) == [None] * 3


def test_processes_that_were_not_started_are_named():
    begun = time.monotonic()
    first, second = meet(free_port(), 4, [0, 2], timeout=2.0)
    assert "Of 4 processes, these were not heard of within 2 s: 1, 3. Were they started" in first
    assert "did not let process 2 join within 2 s: it waits for others, it has stopped (its own output says why)" in second
    assert time.monotonic() - begun < 20


def test_another_number_of_processes_is_said():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda arguments: meet(port, *arguments), [(2, [0]), (3, [1])])
    assert "This is process 0 of 2, and another says that it is process 1 of 3; give all the same." in first[0]
    assert "did not let process 1 join" in second[0]


def test_a_stranger_at_the_port_of_process_0_is_not_counted():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(meet, port, 2, [0])
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\n")
                break
            time.sleep(0.05)
        assert meet(port, 2, [1]) == [None]
        assert first.result() == [None]


def test_a_port_that_another_program_has():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        assert f"Port {port} of the coordinator cannot be used (Address already in use)" in meet(port, 2, [0])[0]

        def answer():
            line, _ = other.accept()
            with line:
                line.sendall(b"220 mail.example.org ready\r\n")

        answering = threading.Thread(target=answer)
        answering.start()
        assert "did not let process 1 join within 1 s" in meet(port, 2, [1], timeout=1.0)[0]
        answering.join()


def test_a_partner_that_never_starts_is_a_sentence_in_time(tmp_path):
    """From the first line of a program to its end, for process 0 and for another."""
    code = (
        "from bsvae_jax.distributed import multihost\nfrom bsvae_jax.errors import UserError\n"
        "try: multihost.join('localhost:{}', 2, {}, timeout=2)\n"
        "except UserError as error: print(error)\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for process, sentence in enumerate(["these were not heard of within 2 s: 1.", "Process 0 was not reached at localhost:"]):
        command = [sys.executable, "-c", code.format(free_port(), process)]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert (found.returncode, sentence in found.stdout) == (0, True), found


def test_one_process_alone_asks_nobody():
    assert multihost.is_only()
    assert multihost.is_primary()
    assert multihost.in_any_process(True, False) == (True, False)
    multihost.check_agreement("config", {"beta": 1.0}, "")
    tree = {"a": np.ones(2)}
    assert multihost.from_primary(tree) is tree
    assert multihost.on_primary(lambda: [1], [2]) == [1]
    with pytest.raises(ValueError, match="as it was"), multihost.ends_together():
        raise ValueError("as it was")


@pytest.mark.parametrize(
    "words",
    [
        "UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:14533",
        "UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error [127.0.0.1]:7561: Connection reset by peer",
        "UNKNOWN: Gloo AllReduce failed: [pair.cc:547] Write error [127.0.0.1]:7561: Broken pipe",
        "INTERNAL: NCCL operation ncclAllReduce(buffer) failed: remote process exited or there was a network error.",
        "UNAVAILABLE: Socket closed",
    ],
)
def test_a_connection_that_a_partner_closed_is_told_in_a_sentence(monkeypatch, words):
    monkeypatch.setattr(multihost, "is_only", lambda: False)
    monkeypatch.setattr(multihost.atexit, "register", lambda function: None)
    for closed in (jax.errors.JaxRuntimeError(words), ValueError(words)):  # JAX raises either
        with pytest.raises(UserError, match="The connection to another process is closed") as error, multihost.ends_together():
            raise closed
        assert error.value.__cause__ is closed
    with pytest.raises(jax.errors.JaxRuntimeError, match="of another kind"), multihost.ends_together():
        raise jax.errors.JaxRuntimeError("of another kind")
