"""Kills, damaged files, full disks: nothing is lost, nothing is wrong, nothing ends in a traceback.

The long ones run by name, `python -m pytest -m faults -s` (a quarter of an hour on two idle cores), and print what
they counted; a smaller one of each kind is among the ordinary tests.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import bsvae_jax as bv
from bsvae_jax._io import disk as space
from bsvae_jax._io.files import digest
from bsvae_jax.cli import main
from bsvae_jax.distributed.preemption import Interrupted, Stop
from bsvae_jax.errors import DivergenceError, UserError
from bsvae_jax.training import workdir
from bsvae_jax.training.checkpoints import Checkpoints
from bsvae_jax.training.evaluated import read_evaluation

pytestmark = pytest.mark.usefixtures("unchecked")

CONFIG = """
from bsvae_jax.config import MLP, Config, Digits, Optimizer
from bsvae_jax.sweeps.grid import Sweep
from bsvae_jax.objective import Constant, Optimal
def get_config():
    return Config(
        data=Digits(validation=None), network=MLP((32,)), latent_size=4, epochs={epochs}, batch_size=100, devices=1,
        evaluate_every=5, steps_per_dispatch=4,
        optimizer=Optimizer(learning_rate=1e-3, ema_decay=0.99),
    )
def get_sweep():
    return Sweep(beta=(0.5, 2.0), decoder_variance=(Optimal(), Constant(0.1)), seeds=1)
"""


def config_file(folder, epochs=100):
    path = folder / "small.py"
    path.write_text(CONFIG.format(epochs=epochs))
    return path


def start(*arguments):
    """The command in a process of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(bv.__file__).parents[1])}
    command = [sys.executable, "-m", "bsvae_jax", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def seconds_of(*arguments):
    """How long the command takes, uninterrupted."""
    begin = time.monotonic()
    process = start(*arguments)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return time.monotonic() - begin


def kept(folder):
    """When what is kept in a folder was computed, in seconds since 1970: its newest checkpoint begun, or image written."""
    checkpoints = [path for path in folder.rglob("_CHECKPOINT_METADATA") if path.parent.name.isdigit()]  # others are unfinished
    times = [json.loads(path.read_text())["init_timestamp_nsecs"] / 1e9 for path in checkpoints]
    return max([*times, *(path.stat().st_mtime for path in folder.glob("*.png"))], default=0.0)


def kill_until(finished, kills, longest, seed, folder, *arguments, number=signal.SIGKILL):
    """Kill the command at random moments of its life, `kills` times or until `finished()`, then let it end.

    Returns:
      Seconds lost by each kill, from what is kept in `folder` or the start of the process, whichever came later; and what the
      command said where it ended neither by the kill nor well (there should be none).
    """
    generator = random.Random(seed)
    lost, odd = [], []
    while len(lost) < kills and not finished():
        begun = time.time()
        process = start(*arguments)
        time.sleep(generator.uniform(0.3, longest))
        if process.poll() is None:
            process.send_signal(number)
            killed = time.time()
            _, errors = process.communicate(timeout=300)  # SIGTERM: it saves
            lost.append(max(0.0, killed - max(begun, kept(folder))))
        else:
            _, errors = process.communicate()
        if process.returncode not in (0, -number, 128 + number):
            odd.append(errors[-2000:])
        elif process.returncode == 0:
            break
    process = start(*arguments)
    _, errors = process.communicate(timeout=600)
    if process.returncode:
        odd.append(errors[-2000:])
    return lost, odd


def survived(command, lost, also):
    """What is printed of kills that were all survived."""
    print(f"\n{command}: {len(lost)} / {len(lost)} kills survived, at most {max(lost):.1f} s lost by one; {also}")


def arrays_of(run):
    """Digest of everything the newest checkpoint holds, optimizer state and all."""
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        metadata = checkpoints._manager.metadata(steps[-1]).custom_metadata
    return steps, metadata["sha256"]


def check_identical(run, expected):
    """To the bit: metrics, numbers, the last checkpoint's arrays, calibration and every figure."""
    (steps, arrays), (expected_steps, expected_arrays) = arrays_of(run), arrays_of(expected)
    assert (steps[-1], arrays) == (expected_steps[-1], expected_arrays)
    files = ["metrics.jsonl", "evaluation.json"]
    files += [str(path.relative_to(expected)) for path in expected.rglob("*.png")]
    for name in files:
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    with np.load(run / "calibration.npz") as one, np.load(expected / "calibration.npz") as other:
        assert all(np.array_equal(one[name], other[name]) for name in other)


# --- Kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGKILL, 15), (signal.SIGTERM, 10)], ids=["SIGKILL", "SIGTERM"])
def test_training_killed_at_random_moments_ends_as_if_it_had_not_been(number, wanted, tmp_path):
    file = config_file(tmp_path, epochs=500)
    whole = seconds_of("train", file, "--workdir", tmp_path / "whole")
    lost, runs = [], 0
    while len(lost) < wanted:  # a fresh run whenever one has ended
        run = tmp_path / f"killed{runs}"
        done = lambda run=run: (run / "figures" / "samples.png").exists()  # noqa: E731
        command = ("train", file, "--workdir", run)
        more, odd = kill_until(done, wanted - len(lost), 0.6 * whole, runs, run, *command, number=number)
        assert not odd, odd[0]
        check_identical(run, tmp_path / "whole")
        lost, runs = lost + more, runs + 1
    survived(f"train, {number.name}", lost, f"{runs} / {runs} runs identical, one takes {whole:.1f} s")


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_a_sweep_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    file = config_file(tmp_path, epochs=150)
    whole = seconds_of("sweep", file, "--workdir", tmp_path / "whole")
    lost, runs = [], 0
    while len(lost) < 11:
        run = tmp_path / f"killed{runs}"
        done = lambda run=run: (run / "report.html").exists()  # noqa: E731
        more, odd = kill_until(done, 11 - len(lost), 0.6 * whole, 10 + runs, run, "sweep", file, "--workdir", run)
        assert not odd, odd[0]
        for name in ("table.csv", "members.csv", "table.md"):
            assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        for member in (tmp_path / "whole" / "members").iterdir():
            check_identical(run / "members" / member.name, member)
        lost, runs = lost + more, runs + 1
    survived("sweep, SIGKILL", lost, f"{4 * runs} / {4 * runs} members identical, one sweep takes {whole:.1f} s")


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_evaluation_and_sampling_killed_at_random_moments(tmp_path):
    file = config_file(tmp_path, epochs=20)
    seconds_of("train", file, "--workdir", tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    evaluating = ("--samples", 2000, "--no-figures")
    longest = 0.6 * seconds_of("evaluate", tmp_path / "whole", *evaluating)
    before = (tmp_path / "run" / "evaluation.json").read_bytes()
    lost, tries = [], 0
    while len(lost) < 6:  # a fresh copy whenever one is evaluated
        run = tmp_path / f"run{tries}"
        shutil.copytree(tmp_path / "run", run)
        changed = lambda run=run: (run / "evaluation.json").read_bytes() != before  # noqa: E731
        more, odd = kill_until(changed, 6 - len(lost), longest, 20 + tries, run, "evaluate", run, *evaluating)
        assert not odd, odd[0]
        assert (run / "evaluation.json").read_bytes() == (tmp_path / "whole" / "evaluation.json").read_bytes()
        lost, tries = lost + more, tries + 1
    survived("evaluate, SIGKILL", lost, "all identical")
    sampling = ("sample", tmp_path / "whole", "--count", 8000, "--out")
    longest = seconds_of(*sampling, tmp_path / "expected")
    names = sorted(path.name for path in (tmp_path / "expected").glob("*.png"))
    lost, tries = [], 0
    while len(lost) < 8:
        out = tmp_path / f"out{tries}"
        more, odd = kill_until(lambda: False, 8 - len(lost), longest, 40 + tries, out, *sampling, out)
        assert not odd, odd[0]
        assert names == sorted(path.name for path in out.glob("*.png"))
        assert all((out / name).read_bytes() == (tmp_path / "expected" / name).read_bytes() for name in names)
        lost, tries = lost + more, tries + 1
    survived("sample, SIGKILL", lost, "all identical")


@pytest.mark.slow  # `test_hosts` has a signal to a process, `-m faults` many
def test_a_second_signal_quits_at_once_and_the_first_one_saves(tmp_path):
    """SIGTERM in the middle: status 143, a sentence, and the run continues to the same end."""
    file = config_file(tmp_path, epochs=60)
    assert seconds_of("train", file, "--workdir", tmp_path / "whole")
    process = start("train", file, "--workdir", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    if process.returncode != 0:  # a fast machine may have finished
        assert process.returncode == 143, errors
        assert "SIGTERM: finishing this step and saving" in errors
        assert "the same command continues there" in errors
        assert "Traceback" not in errors, errors
    seconds_of("train", file, "--workdir", tmp_path / "run")
    check_identical(tmp_path / "run", tmp_path / "whole")


class StopAfter(Stop):
    """Asks to stop at the n-th look."""

    def __init__(self, looks):
        self._looks = looks

    @property
    def number(self):
        self._looks -= 1
        return int(signal.SIGTERM) if self._looks < 0 else None


@pytest.fixture(scope="module")
def config():
    return bv.Config(
        data=bv.data.Digits(validation=None),
        network=bv.config.MLP((8,)),
        latent_size=2,
        epochs=4,
        batch_size=500,
        devices=1,
        evaluate_every=2,
        steps_per_dispatch=1,
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    bv.fit(config, folder, progress=False)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("looks", [0, 1, 3, 5, 8, 13, 21])
def test_stopped_at_any_step_it_ends_as_if_it_had_not_been(looks, config, whole, tmp_path, monkeypatch):
    """In the middle of an epoch and of a row of the metrics as well."""
    from bsvae_jax.training import trainer

    original = trainer.Trainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "__init__", lambda self, *arguments: original(self, *arguments[:-1], StopAfter(looks)))
        with contextlib.suppress(Interrupted):
            bv.fit(config, tmp_path / "run", progress=False)
    bv.fit(config, tmp_path / "run", progress=False)
    check_identical(tmp_path / "run", whole)


# --- Damaged files ----------------------------------------------------------------------------------------------------


def mutate(path, generator):
    """Flip, overwrite, cut or repeat a piece of a file."""
    content = bytearray(path.read_bytes())
    if not content:
        return
    kind, position = generator.choice(["flip", "overwrite", "cut", "empty", "repeat"]), generator.randrange(len(content))
    if kind == "flip":
        content[position] ^= 1 << generator.randrange(8)
    elif kind == "overwrite":
        length = min(generator.randrange(1, 64), len(content) - position)
        content[position : position + length] = generator.randbytes(length)
    elif kind == "cut":
        content = content[:position]
    elif kind == "empty":
        content = bytearray()
    else:
        content[position:position] = content[position : position + 64]
    path.write_bytes(content)


def numbers(folder):
    """What a user would go on with: every number of the report, and the parameters."""
    evaluation = read_evaluation(folder)
    report = None if evaluation is None else json.dumps(evaluation.report, default=str)
    return report, digest(bv.restore(folder).variables)


def damage(folder, expected, work, count, seed, caplog):
    """Mutate files of a run one at a time and use it; what came of it."""
    outcomes = {"unchanged": 0, "sentence": 0, "older checkpoint": 0, "continued": 0}
    generator = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png" and "events" not in path.name)
    report, parameters = expected
    for _ in range(count):
        copy = work / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        victim = copy / generator.choice(files).relative_to(folder)
        mutate(victim, generator)
        caplog.clear()
        try:
            found = numbers(copy)
        except UserError:
            outcomes["sentence"] += 1
            continue
        warned = "does not load" in caplog.text
        if found[1] != parameters:
            assert warned, f"{victim} gave other parameters without a word"
            outcomes["older checkpoint"] += 1
        else:
            outcomes["unchanged"] += 1
            assert victim.name in ("evaluation.json", "config.json") or found[0] == report, f"{victim} changed the report"
    return outcomes


@pytest.mark.long
def test_damaged_files_of_a_run(whole, tmp_path, caplog):
    outcomes = damage(whole, numbers(whole), tmp_path, 40, 0, caplog)
    assert outcomes["sentence"] > 0
    assert outcomes["older checkpoint"] > 0


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_hundreds_of_damaged_files(whole, tmp_path, caplog, capsys):
    outcomes = damage(whole, numbers(whole), tmp_path, 500, 1, caplog)
    with capsys.disabled():
        print(f"\n500 mutations: {outcomes}, 0 tracebacks, 0 wrong parameters")


def test_a_flipped_bit_in_a_checkpoint_is_seen(whole, tmp_path, caplog):
    """In every file of numbers of the newest checkpoint: the one before is used, and said to be."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for victim in (copy / "checkpoints" / "12").rglob("d/*"):
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    assert bv.restore(copy).step == 6
    assert "does not load" in caplog.text


@pytest.mark.long
def test_damaged_metrics_of_a_checkpoint_are_named_and_moved_aside(config, whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "checkpoints" / "12" / "metrics" / "metrics").write_text('{"objective": 3')
    with pytest.raises(UserError, match="the metrics of step 12 are damaged"):
        bv.restore(copy)
    bv.fit(config, copy, progress=False)
    assert (copy / "damaged_checkpoints" / "12_0").is_dir()
    check_identical(copy, whole)


def test_a_newer_checkpoint_is_refused(whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for path in (copy / "checkpoints").glob("*/_CHECKPOINT_METADATA"):
        values = json.loads(path.read_text())
        values["custom_metadata"]["format"] = 99
        path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="written by a newer bsvae_jax \\(format 99"):
        bv.restore(copy)


# --- Disks, clocks, memory, URLs --------------------------------------------------------------------------------------


def test_a_disk_without_room_is_refused_before_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "check_room", lambda folder, *a, **k: space.check_room(folder, *a, **k))
    monkeypatch.setattr(space, "free_bytes", lambda folder: 2**20)
    with pytest.raises(UserError, match=r"has 1 MiB free, this run needs \d+ MiB for checkpoints"):
        bv.fit(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("soft", "hard", "runs", "set_to"),
    [
        (1024, 4096, 10, None),
        (-1, -1, 10**6, None),
        (256, -1, 100, (264, -1)),
        (16, 66, 1, (66, 66)),
        (16, 65, 1, "66"),
        (70, 83, 10, "84"),
    ],
)
def test_files_that_may_be_open_are_asked_for_before_training(soft, hard, runs, set_to, monkeypatch):
    asked = []
    monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(limits))
    if isinstance(set_to, str):
        with pytest.raises(UserError, match=rf"may have {hard} files open here, .* needs {set_to}: .*ulimit -n {set_to}"):
            space.check_open_files(runs)
    else:
        space.check_open_files(runs)
    assert asked == ([set_to] if isinstance(set_to, tuple) else [])


@pytest.mark.faults
def test_a_run_that_may_open_few_files_says_so(tmp_path):
    file = config_file(tmp_path, epochs=1)
    command = f"ulimit -n 24; exec {sys.executable} -m bsvae_jax train {file} --workdir {tmp_path}/run"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert found.stderr.splitlines()[-1].startswith("error: A process may have 24 files open here"), found.stderr


@pytest.mark.long
def test_a_disk_that_fills_up_pauses_saving_and_keeps_the_run_alive(config, whole, tmp_path, monkeypatch, caplog):
    free = [2**40]
    monkeypatch.setattr(workdir, "free_bytes", lambda folder: free[0])
    log = workdir.RunDirectory.log

    def fill(self, row):
        free[0] = 0 if 6 <= row["step"] < 12 else 2**40  # full at the first checkpoint, free again at the second
        log(self, row)

    monkeypatch.setattr(workdir.RunDirectory, "log", fill)
    bv.fit(config, tmp_path / "run", progress=False)
    errors = caplog.text
    assert "Saving in" in errors
    assert "No checkpoint was saved yet" in errors
    assert "saving again, from step 12" in errors
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert arrays_of(tmp_path / "run")[0] == [12]


@pytest.mark.long
def test_a_disk_that_stays_full_is_an_error_at_the_end(config, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "free_bytes", lambda folder: 0)
    with pytest.raises(
        UserError, match=r"The end of training could not be saved in .*run \(\d+ MiB are free, a checkpoint takes"
    ):
        bv.fit(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "evaluation.json").exists(), "a run that is not saved is not finished"
    monkeypatch.undo()
    assert bv.fit(config, tmp_path / "run", progress=False).report


@pytest.mark.faults
def test_a_real_full_disk(tmp_path):
    """A tmpfs of 40 MiB whose rest is taken while training: the command ends with a sentence, and continues once it is free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        file = config_file(tmp_path, epochs=150)
        process = start("train", file, "--workdir", disk / "run")
        while not list((disk / "run" / "checkpoints").glob("[0-9]*")) and process.poll() is None:
            time.sleep(0.01)
        with (disk / "ballast").open("wb", buffering=0) as ballast:
            for size in (2**20, 2**12, 1):
                try:
                    while ballast.write(bytes(size)) == size:
                        pass
                except OSError:
                    pass
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2, errors
        assert "free some space" in errors
        assert "Traceback" not in errors, errors
        (disk / "ballast").unlink()
        seconds_of("train", file, "--workdir", disk / "run")
        seconds_of("train", file, "--workdir", tmp_path / "whole")
        check_identical(disk / "run", tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


@pytest.mark.long
def test_a_clock_that_jumps_changes_nothing(config, whole, tmp_path, monkeypatch):
    """An hour back after the first row, two forward after the second."""
    now, offsets = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + offsets[0])
    log = workdir.RunDirectory.log

    def jump(self, row, **clocked):
        offsets[0] = -3600.0 if row["step"] < 6 else 3600.0
        log(self, row, **clocked)

    monkeypatch.setattr(workdir.RunDirectory, "log", jump)
    bv.fit(config, tmp_path / "run", progress=False)
    check_identical(tmp_path / "run", whole)


def test_more_memory_than_there_is(tmp_path, capsys):
    path = tmp_path / "large.py"
    path.write_text(
        "from bsvae_jax.config import MLP, Config\n"
        "def get_config(): return Config(network=MLP((3_000_000, 3_000_000)), batch_size=100, epochs=1, devices=1)\n"
    )
    with pytest.raises(SystemExit) as stop:
        main.main(["train", str(path), "--workdir", str(tmp_path / "run")])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "memory" in errors or "MiB free" in errors
    assert "MiB" in errors or "bytes" in errors, errors


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run", "gs:/bucket/run"])
def test_a_workdir_that_is_a_url_is_refused(url, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is a URL; --workdir must be a local folder"):
        bv.fit(config, url, progress=False)
    assert not list(tmp_path.iterdir())


# --- Numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_step_that_is_not_finite_can_be_run_again(tmp_path):
    """The two lines of the message, as they stand there."""
    config = bv.Config(
        data=bv.data.Digits(validation=None),
        network=bv.config.MLP((8,)), latent_size=2, epochs=3, batch_size=500, devices=1, decoder_variance=bv.Constant(1e-6),
        optimizer=bv.config.Optimizer(learning_rate=1e4),
    )  # fmt: skip
    with pytest.raises(DivergenceError, match=r"Step (\d+) is not finite") as error:
        bv.fit(config, tmp_path / "run", progress=False)
    step = int(str(error.value).split()[1])
    failed = bv.failed_step(tmp_path / "run")
    assert int(failed.state.step) == step - 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(failed.state.params))
    _, metrics = bv.train_step(*failed)
    assert not np.isfinite(np.asarray(metrics)).all()
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert len(lines) == 2
    with pytest.raises(FloatingPointError, match="nan"):
        exec("\n".join(lines), {})


@pytest.mark.long
def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path, caplog):
    """A learning rate that overflows at every second step's gradient is hard to arrange; a batch with infinity is not."""
    import jax.numpy as jnp

    config = bv.Config(
        data=bv.data.Digits(validation=None),
        network=bv.config.MLP((8,)), latent_size=2, epochs=3, batch_size=500, devices=1, steps_per_dispatch=1,
        optimizer=bv.config.Optimizer(skip_nonfinite=2, ema_decay=0.9),
    )  # fmt: skip
    from bsvae_jax.training import step as training

    bad_steps = jnp.array([2, 3, 6])
    original = training.prepare_batch

    def spoil(state, *arguments):
        batch, labels, key = original(state, *arguments)
        return jnp.where(jnp.isin(state.step, bad_steps), jnp.inf, batch), labels, key

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "prepare_batch", spoil)
        result = bv.fit(config, tmp_path / "run", progress=False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.arrays()))
    rows = [row for row in workdir.read_metrics(tmp_path / "run") if row["split"] == "train"]
    assert [row.get("skipped_steps", 0) for row in rows] == [1, 1, 1]  # steps 3; 4; 7, of 3 in an epoch
    assert all(np.isfinite(row["objective"]) for row in rows)
    assert "step 3 is not finite and is left out" in caplog.text
    # Three in a row are one too many.
    bad_steps = jnp.array([2, 3, 4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "prepare_batch", spoil)
        with pytest.raises(DivergenceError, match="Step 5 is not finite"):
            bv.fit(config, tmp_path / "other", progress=False)


def test_a_run_that_has_not_failed_has_no_failed_step(whole):
    with pytest.raises(UserError, match=r"no failure\.npz"):
        bv.failed_step(whole)
