"""What a user's surroundings do to a command: terminals, closed and full streams, plotting backends, absent platforms."""

import functools
import os
import pwd
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers import refused

import bsvae_jax as bv
from bsvae_jax._io.files import cache_folder
from bsvae_jax.cli.environment import commandline_environment, expand_user
from bsvae_jax.distributed.hardware import check_platform
from bsvae_jax.errors import UserError

WRITE = """
import sys
from bsvae_jax.cli.environment import commandline_environment
with commandline_environment():
    print("x" * 100_000, file=sys.stderr)
    print("β ± 1, σ² × 2, 漢")
"""


def shell(command, **environment):
    """Run `command` in a shell, where $PYTHON is this interpreter and $CODE writes to both streams."""
    known = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "CODE": WRITE}
    known |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    return subprocess.run(
        ["sh", "-c", command], env=known | environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_an_ascii_terminal_is_written_to_in_ascii():
    result = shell('"$PYTHON" -c "$CODE"', PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, "beta +- 1, sigma^2 x 2, \\u6f22\n"), result.stderr[-500:]


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_standard_error_that_takes_nothing_is_no_failure(where, unbuffered):
    if where == "2>/dev/full" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    result = shell(f'"$PYTHON" -c "$CODE" {where}', PYTHONUNBUFFERED=unbuffered, PYTHONIOENCODING="utf-8")
    assert (result.returncode, result.stdout) == (0, "β ± 1, σ² × 2, 漢\n")


def test_what_is_said_stands_in_a_file_at_once(tmp_path):
    """A line on standard error is seen while the command goes on, and is not lost with it."""
    script = (
        "import os, sys\n"
        "from bsvae_jax.cli.environment import commandline_environment\n"
        "with commandline_environment():\n"
        "    print('said', file=sys.stderr)\n"
        "    os._exit(0 if os.fstat(2).st_size == 5 else 1)\n"
    )
    with (tmp_path / "log").open("w") as log:
        assert subprocess.run([sys.executable, "-c", script], stderr=log, check=False).returncode == 0


def test_a_standard_error_that_takes_nothing_leaves_the_status_of_an_error():
    assert shell('"$PYTHON" -m bsvae_jax report --nothing 2>&-').returncode == 2


def test_the_number_of_a_closed_stream_is_not_given_to_a_file(tmp_path):
    """What libraries write to file descriptor 2 would end in it."""
    code = (
        "import sys; from bsvae_jax.cli.environment import commandline_environment\n"
        f"with commandline_environment(): print(open({str(tmp_path / 'file')!r}, 'w').fileno())"
    )
    result = shell('"$PYTHON" -c "$CODE" 2>&-', CODE=code)
    assert int(result.stdout) > 2


def test_a_terminal_of_one_column():
    result = shell('"$PYTHON" -m bsvae_jax report run --nothing 1', COLUMNS="1")
    assert result.returncode == 2
    assert "Unrecognized options" in result.stderr


def test_a_reader_that_has_seen_enough():
    result = shell('"$PYTHON" -m bsvae_jax report --help | true')
    assert "Traceback" not in result.stderr


def test_commands_draw_without_a_display_and_give_the_variables_back(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://of_a_notebook")
    monkeypatch.setenv("COLUMNS", "1")
    with commandline_environment():
        assert os.environ["MPLBACKEND"] == "agg"
        assert int(os.environ["COLUMNS"]) >= 40
    assert (os.environ["MPLBACKEND"], os.environ["COLUMNS"]) == ("module://of_a_notebook", "1")


@pytest.mark.long
def test_a_command_runs_under_strict_checks_of_jax(tmp_path):
    config = "from bsvae_jax.config import MLP, Config\n"
    config += "def get_config(): return Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)"
    (tmp_path / "small.py").write_text(config)
    command = f'"$PYTHON" -m bsvae_jax train {tmp_path}/small.py --workdir {tmp_path}/run'
    result = shell(command, JAX_NUMPY_DTYPE_PROMOTION="strict", JAX_TRANSFER_GUARD="disallow")
    assert result.returncode == 0, result.stderr


def test_checks_of_jax_are_given_back(monkeypatch):
    monkeypatch.setenv("JAX_TRANSFER_GUARD", "disallow")
    monkeypatch.delenv("JAX_NUMPY_DTYPE_PROMOTION", raising=False)
    with commandline_environment():
        assert os.environ["JAX_TRANSFER_GUARD"] == "allow"
        assert "JAX_NUMPY_DTYPE_PROMOTION" not in os.environ
    assert os.environ["JAX_TRANSFER_GUARD"] == "disallow"


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    given = ["~/run", "--out=~/x.npz", "--data.path=~/d", "a~/b", "--beta", "1", "x=~/y"]
    wanted = [
        "/home/somebody/run",
        "--out=/home/somebody/x.npz",
        "--data.path=/home/somebody/d",
        "a~/b",
        "--beta",
        "1",
        "x=~/y",
    ]
    assert expand_user(given) == wanted


def test_a_user_without_a_name_and_a_home_has_a_cache(monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("BSVAE_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/bsvae_jax")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for argument in ("~/run", "--workdir=~/run", "~"):
        with pytest.raises(UserError, match="is a path in the home folder, but this user has none"):
            expand_user(["train", argument])
    assert expand_user(["~run"]) == ["~run"]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder().parent == tmp_path


@pytest.mark.parametrize(
    ("error", "platform", "sentence"),
    [
        (AssertionError(), "cuda", r"cuda needs an NVIDIA GPU.*pip install -U 'jax\[cuda13\]'"),  # as JAX 0.10 without a GPU
        (RuntimeError("Unable to initialize backend 'tpu'"), "tpu", r"tpu needs .*jax\[tpu\]"),
    ],
)
def test_a_platform_that_is_absent(error, platform, sentence, monkeypatch, tmp_path):
    def devices():
        raise error

    monkeypatch.setenv("JAX_PLATFORMS", platform)
    monkeypatch.setattr(jax, "devices", devices)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platform)
    try:
        for asks in (check_platform, functools.partial(bv.fit, bv.Config(), tmp_path), functools.partial(bv.restore, tmp_path)):
            with pytest.raises(UserError, match=sentence):
                asks()
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.long
@pytest.mark.parametrize(
    "command", ["sample .", "train small.py", "sweep small.py", "evaluate .", "export .", "bench small.py"]
)
def test_a_platform_that_nobody_has(tmp_path, command):
    (tmp_path / "small.py").write_text("import bsvae_jax as bv\ndef get_config(): return bv.Config(data=bv.data.Digits())\n")
    result = shell(f'cd {tmp_path}; "$PYTHON" -m bsvae_jax {command}', JAX_PLATFORMS="nonsense")
    assert result.returncode == 2
    assert result.stderr.startswith("error: JAX cannot use nonsense (JAX_PLATFORMS=nonsense) on this machine: known platforms")
    assert "Traceback" not in result.stderr


def test_the_time_to_wait_for_other_processes_is_an_option(tmp_path, capsys, monkeypatch):
    from bsvae_jax.distributed import multihost

    def join(*place, timeout):
        raise UserError(f"waited {timeout} s at {place}")

    monkeypatch.setattr(multihost, "join", join)
    path = tmp_path / "small.py"
    path.write_text("import bsvae_jax as bv\ndef get_config():\n    return bv.Config()\n")
    command = ("train", path, "--coordinator", "host:1", "--processes", 2, "--process", 1)
    assert "waited 60 s at ('host:1', 2, 1)" in refused(capsys, *command)
    assert "waited 7 s" in refused(capsys, *command, "--connect-timeout", 7)
    assert "waited 60 s at (None, None, None)" in refused(capsys, "train", path, "--distributed")
    assert "--connect-timeout must be a whole number >= 1, got 0" in refused(capsys, *command, "--connect-timeout", 0)
