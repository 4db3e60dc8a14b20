"""The command line as a user meets it: what it leaves, what it prints, and the sentence for everything that is wrong."""

import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bsvae_jax.cli import main
from bsvae_jax.training.workdir import read_info

CONFIG = """
from bsvae_jax.config import MLP, Config
def get_config():
    return Config(network=MLP((16,)), latent_size=4, epochs=1, batch_size=500, devices=1, posterior_samples=1)
"""

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.py").write_text(CONFIG)
    main.main(["train", str(folder / "small.py"), "--workdir", str(folder / "run")])
    return folder / "run"


def refused(arguments, capsys):
    """Run a command that must fail; its message on one line, with tyro's frame removed."""
    with pytest.raises(SystemExit) as stop:
        main.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    text = " ".join((captured.err + captured.out).translate(str.maketrans("│╭╮╰╯─", "      ")).split())
    assert "Traceback" not in text
    return text


# --- What works -------------------------------------------------------------------------------------------------------


def test_train_leaves_numbers_and_figures(trained):
    report = json.loads((trained / "evaluation.json").read_text())
    assert set(report["splits"]) == {"train", "test", "validation"}
    values = {name: quantity["value"] for name, quantity in report["splits"]["validation"].items()}
    assert values["objective"] == pytest.approx(values["distortion"] + values["rate"])
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert values["objective"] == pytest.approx(last["objective"])  # the same posterior samples as at the end of training
    for name in ("training_curves", "reconstructions", "samples", "latent_traversals"):
        with Image.open(trained / "figures" / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors(256)) > 20, f"{name} shows nothing"


@pytest.mark.long
def test_options_reach_the_config(config_file, tmp_path):
    command = ["train", config_file, "--workdir", tmp_path / "run", "--beta", 4, "--decoder-variance", "constant"]
    command += ["--decoder-variance.variance", 0.1, "--optimizer.learning-rate", "3e-4", "--network.hidden", 8, 8]
    main.main([str(part) for part in command])
    config = read_info(tmp_path / "run").config
    assert (config.beta, config.decoder_variance.variance, config.network.hidden) == (4.0, 0.1, (8, 8))
    assert config.optimizer.learning_rate == 3e-4
    assert config.latent_size == 4  # the file's, not the library's default


@pytest.mark.long
def test_numbers_of_a_conditional_run_are_said_to_be_of_p_of_x_given_y(config_file, tmp_path, capsys):
    main.main(["train", str(config_file), "--workdir", str(tmp_path / "run"), "--classes", "10"])
    assert "these are likelihoods of p(x|y), which no p(x) is to be compared with" in capsys.readouterr().out


@pytest.mark.long
def test_evaluate_prints_units_and_standard_errors(trained, capsys):
    before = json.loads((trained / "evaluation.json").read_text())["splits"]
    main.main(["evaluate", str(trained), "--split", "test"])
    lines = capsys.readouterr().out.splitlines()
    assert "train" not in lines[0]
    (line,) = [line for line in lines if line.startswith("calibrated_elbo ")]
    assert "±" in line
    assert "nats" in line
    values = json.loads((trained / "evaluation.json").read_text())["splits"]
    for name, quantity in before["test"].items():
        # Training evaluates on its own devices (here one), this command on all: sums are taken in another order.
        assert values["test"][name]["value"] == pytest.approx(quantity["value"], rel=1e-6), name


def test_samples_are_reproducible_and_the_first_do_not_depend_on_the_count(trained, tmp_path):
    for name, count in (("a", 3), ("b", 7)):
        main.main(["sample", str(trained), "--count", str(count), "--out", str(tmp_path / f"{name}.npz")])
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["images"].shape == (3, 8, 8, 1)
        assert a["images"].dtype == np.uint8
        np.testing.assert_array_equal(a["images"], b["images"][:3])
        assert (b["images"][0] != b["images"][1]).any()
        expected = a["images"][0]
    main.main(["sample", str(trained), "--count", "2", "--out", str(tmp_path / "folder")])
    with Image.open(tmp_path / "folder" / "000000.png") as image:
        np.testing.assert_array_equal(np.asarray(image), expected[..., 0])
    main.main(["sample", str(trained), "--count", "2", "--out", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").stat().st_size > 1000


COMMANDS = ("prepare", "train", "sweep", "report", "runs", "compare", "evaluate", "sample", "import-torch", "export", "cache")


@pytest.mark.parametrize("command", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(command)
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 300


@pytest.mark.long
def test_the_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "bsvae_jax", "evaluate", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "", "JAX_PLATFORMS": "cpu"})
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "is not a run" in result.stderr


# --- What is wrong, and the sentence it answers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--bata", "3"], "Unrecognized options: --bata, 3 .* Perhaps you meant: --beta"),
        (["--optimizer.learning_rat", "3"], "Perhaps you meant: --optimizer.learning-rate"),
        (["--beta", "-1"], "beta must be a finite number >= 0, got -1"),
        (["--beta", "nan"], "beta must be a finite number >= 0, got nan"),
        (["--beta", "one"], "could not convert string to float: 'one'"),
        (
            ["--decoder-variance", "constant", "--decoder-variance.variance", "-1"],
            "Constant.variance must be a finite number > 0, got -1",
        ),
        (
            ["--decoder-variance", "constant", "--decoder-variance.variance", "nan"],
            "Constant.variance must be a finite number > 0, got nan",
        ),
        (["--decoder-variance.floor", "-1"], "Optimal.floor must be a finite number >= 0, got -1"),
        (["--decoder-variance.over", "pixels"], "invalid choice 'pixels'.*'example', 'batch', 'pixel', 'channel'"),
        (["--decoder-variance", "fixed"], "invalid choice 'fixed'.*constant"),
        (["--latent-size", "0"], "latent_size must be a whole number >= 1, got 0"),
        (["--latent-size", "65"], "latent_size 65 exceeds the 64 pixels"),
        (["--batch-size", "5000"], "batch_size 5000 exceeds the 1350 training images"),
        (["--devices", "8", "--batch-size", "12"], "batch_size 12 does not divide over 8 devices; 16 would"),
        (["--devices", "9"], r"devices must lie in 1 \.\.\. 8"),
        (["--network.hidden"], "network.hidden must be a tuple of at least one width"),
        (["--optimizer.warmup-steps", "4294967296"], "optimizer.warmup_steps must be a whole number >= 0 and <= 2147483647"),
        (["--epochs", "9" * 400], "epochs must be a whole number >= 1 and <= 2147483647, got an integer of 1329 bits"),
        (["--seed", "4294967296"], r"seed must be a whole number >= 0 and <= 4294967295, got 4294967296"),
        (["--optimizer.learning-rate", "0"], "optimizer.learning_rate must be a finite number > 0"),
        (["--data", "mnist", "--data.folder", "nowhere"], "nowhere lacks train-images-idx3-ubyte.gz"),
        (["--data", "arrays", "--data.path", "nowhere.npz"], "There is no file 'nowhere.npz'"),
        (["--workdir", "/dev/null/run"], "/dev/null/run cannot be written"),
        (["--start-from", "nowhere"], "nowhere is not a run: it has no config.json"),
        (["--start-from", "runs/x", "--workdir", "runs/x"], "--start-from runs/x is the --workdir itself"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_answered_before_anything_is_written(options, sentence, config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_matches(refused(["train", config_file, *options], capsys), sentence)
    assert not (tmp_path / "runs").exists()


def assert_matches(text, sentence):
    assert re.search(sentence, text), text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("Config(latent_sise=4)", r"Config has no field 'latent_sise' \(did you mean 'latent_size'\?\)"),
        ("Config(optimizer=Optimizer(learnin_rate=1))", "Optimizer has no field .* mean 'learning_rate'"),
        ("Config(beta=float('nan'))", "beta must be a finite number"),
        ("Config(decoder_variance=Constant(0))", "Constant.variance must be a finite number > 0, got 0"),
        (
            "Config(decoder_variance=Optimal(over='pixel_and_example'))",
            "A variance per pixel and per example is unbounded below",
        ),
        ("Config(decoder_variance=Constant('0.1'))", "Constant.variance must be a finite number > 0, got '0.1'"),
        ("Config(decoder_variance=Optimal(over=3))", "over must be one of"),
        ("Config(decoder_variance=Optimal(over='batches'))", r"did you mean 'batch'\?"),
        ("3", "must return a bsvae_jax Config, got int"),
    ],
)
def test_wrong_config_files(content, sentence, tmp_path, capsys):
    path = tmp_path / "wrong.py"
    header = "from bsvae_jax.config import *\nfrom bsvae_jax.objective import Constant, Optimal\n"
    path.write_text(f"{header}def get_config():\n    return {content}\n")
    assert_matches(refused(["train", path, "--workdir", tmp_path / "run"], capsys), sentence)
    assert not (tmp_path / "run").exists()


def test_the_config_file_comes_first(config_file, capsys):
    """Otherwise the options of another config would be parsed, and another experiment trained."""
    assert "The config file comes first" in refused(["train", "--beta", "4", config_file], capsys)


@pytest.mark.long
def test_evaluating_one_split_keeps_the_other(trained):
    main.main(["evaluate", str(trained)])
    before = json.loads((trained / "evaluation.json").read_text())
    main.main(["evaluate", str(trained), "--split", "test"])
    assert json.loads((trained / "evaluation.json").read_text()) == before


def test_a_misspelt_config_file(config_file, capsys):
    text = refused(["train", config_file.with_name("smal.py")], capsys)
    assert "There is no config file" in text
    assert "did you mean" in text


FLOATS = np.full((600, 4, 4, 1), 0.5, np.float32)


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (np.zeros((600, 4), np.uint8), r"must have shape \[N, H, W\] or \[N, H, W, C\], got \(600, 4\)"),
        (np.zeros((600, 4, 4), np.int64), "has signed 64 bits; bits per dimension depend .* give levels=256"),
        (FLOATS * 3, r"must lie in \[0, 1\], got values from 1.5 to 1.5; divide 8-bit values by 255"),
        (FLOATS - 1, r"must lie in \[0, 1\]"),
        (np.where(np.arange(600).reshape(-1, 1, 1, 1) == 7, np.nan, FLOATS), "holds NaN or infinite values in 1 images"),
        (np.zeros((0, 4, 4), np.uint8), "is empty"),
    ],
    ids=["rank", "dtype", "too large", "negative", "nan", "empty"],
)
def test_wrong_arrays(images, sentence, config_file, tmp_path, capsys):
    np.savez(tmp_path / "images.npz", train=images)
    command = ["train", config_file, "--data", "arrays", "--data.path", tmp_path / "images.npz", "--workdir", tmp_path / "run"]
    assert_matches(refused(command, capsys), sentence)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [0, 100, 2000], ids=["empty", "header", "half"])
def test_truncated_files(size, config_file, tmp_path, capsys):
    np.savez(tmp_path / "images.npz", train=FLOATS)
    path = tmp_path / "images.npz"
    path.write_bytes(path.read_bytes()[:size])
    command = ["train", config_file, "--workdir", tmp_path / "run", "--data"]
    assert_matches(refused([*command, "arrays", "--data.path", path], capsys), "images.npz cannot be read as a NumPy file")
    idx = struct.pack(">HBBIII", 0, 8, 3, 10, 28, 28) + bytes(10 * 28 * 28)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx[:size])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 10) + bytes(10))
    assert_matches(
        refused([*command, "mnist", "--data.folder", tmp_path], capsys),
        "train-images-idx3-ubyte is (truncated or damaged|not an idx file)",
    )
    assert not (tmp_path / "run").exists()


def test_the_cache_is_listed_and_cleared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BSVAE_CACHE", str(tmp_path / "cache"))
    main.main(["cache"])
    assert capsys.readouterr().out == f"0 entries in {tmp_path / 'cache'}\n"
    files = ("prepared/cats-1/images.npy", "prepared/cats-2/images.npy", "compiled/program", "downloads/by_hand.zip", "w.pth")
    for name in files:
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / name).write_bytes(bytes(2**20))

    def left():
        return sorted(
            path.relative_to(tmp_path / "cache").as_posix() for path in (tmp_path / "cache").rglob("*") if path.is_file()
        )

    main.main(["cache"])
    shown = capsys.readouterr().out
    assert "1.0 MiB  prepared/cats-1\n" in shown
    assert "5 entries" in shown
    assert "There is no 'prepared/cat-1'" in refused(["cache", "--clear", "compiled", "prepared/cat-1"], capsys)
    assert left() == sorted(files)
    main.main(["cache", "--clear", "prepared/cats-1", "compiled"])
    assert "removed        1.0 MiB  prepared/cats-1\n" in capsys.readouterr().out
    assert left() == ["downloads/by_hand.zip", "prepared/cats-2/images.npy", "w.pth"]
    main.main(["cache", "--clear", "all"])
    assert left() == ["downloads/by_hand.zip"]


@pytest.mark.parametrize("suffix", [".npy", ".zip", ".JPG", ".tar", ".pdf"])
def test_samples_of_other_suffixes_are_refused(suffix, trained, tmp_path, capsys):
    text = refused(["sample", trained, "--out", tmp_path / f"x{suffix}"], capsys)
    assert "--out must end in .npz or .png, or name a folder" in text
    assert not list(tmp_path.iterdir())


def test_suffixes_are_compared_without_case(trained, tmp_path):
    for name in ("x.PNG", "x.NPZ", "runs.v2"):
        main.main(["sample", str(trained), "--count", "3", "--out", str(tmp_path / name)])
    with Image.open(tmp_path / "x.PNG") as image:
        assert image.format == "PNG"
    assert np.load(tmp_path / "x.NPZ")["images"].shape == (3, 8, 8, 1)
    assert len(list((tmp_path / "runs.v2").glob("*.png"))) == 3


@pytest.mark.long
def test_where_the_data_lie_is_no_part_of_a_run(config_file, tmp_path, capsys, monkeypatch):
    def commands(*path):
        for command in (["evaluate", "run", "--split", "test", "--no-figures"], ["fit-prior", "run", "--kind", "gaussian"]):
            yield [command[0], str(tmp_path / command[1]), *command[2:], *map(str, path)]

    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4), np.uint8)
    (tmp_path / "here").mkdir()
    np.savez(tmp_path / "here" / "images.npz", train=images)
    np.savez(tmp_path / "other.npz", train=images[::-1])
    monkeypatch.chdir(tmp_path / "here")
    train = ["train", str(config_file), "--workdir", str(tmp_path / "run"), "--batch-size", "8", "--data", "arrays"]
    main.main([*train, "--data.path", "images.npz"])
    monkeypatch.chdir(tmp_path)
    for command in commands():
        main.main(command)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / "images.npz"
    for command in (*commands("--data.path", moved), [*train, "--data.path", str(moved)]):
        main.main(command)
    for command in commands():
        assert "here/images.npz" in refused(command, capsys)
    for command in (*commands("--data.path", "other.npz"), [*train, "--data.path", "other.npz"]):
        assert "was trained on other images" in refused(command, capsys)


def test_a_workdir_of_another_config_is_left_alone(trained, config_file, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    text = refused(["train", config_file, "--beta", "2", "--workdir", trained], capsys)
    assert "holds a run of another config (beta: 1.0 -> 2.0)" in text
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


@pytest.mark.long
def test_nothing_but_checkpoints_that_do_not_load(config_file, tmp_path, capsys):
    main.main(["train", str(config_file), "--workdir", str(tmp_path / "run")])
    for path in (tmp_path / "run" / "checkpoints").rglob("*"):
        if path.is_file() and "default" in path.parts:
            path.write_bytes(b"")
    assert "No checkpoint loads" in refused(["evaluate", tmp_path / "run"], capsys)


def test_wrong_workdirs_and_files(trained, tmp_path, capsys):
    assert "is not a run" in refused(["evaluate", tmp_path / "nothing"], capsys)
    assert "is not a run" in refused(["sample", tmp_path], capsys)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in refused(["evaluate", tmp_path], capsys)
    (tmp_path / "config.json").write_text('{"format": 1, "config": "x", "data": {"image_shape": [8, 8]}}')
    assert "config.json is damaged" in refused(["evaluate", tmp_path], capsys)
    assert "File name too long" in refused(["evaluate", tmp_path / ("x" * 300)], capsys)
    (tmp_path / "config.json").write_text('{"format": 99}')
    assert "written by a newer bsvae_jax (format 99" in refused(["evaluate", tmp_path], capsys)
    assert "--count must be >= 1" in refused(["sample", trained, "--count", "0"], capsys)
    existing = tmp_path / "images.npz"
    existing.write_bytes(b"precious")
    assert "exists; give another --out" in refused(["sample", trained, "--out", existing], capsys)
    assert existing.read_bytes() == b"precious"
    assert "cannot be written" in refused(["sample", trained, "--out", "/dev/null/x.npz"], capsys)
    assert "--split needs at least one" in refused(["evaluate", trained, "--split"], capsys)
    assert "invalid choice 'valid'" in refused(["evaluate", trained, "--split", "valid"], capsys)


def test_a_run_without_validation_images_has_no_numbers_of_them(config_file, tmp_path, capsys):
    main.main(["train", str(config_file), "--workdir", str(tmp_path / "run"), "--data.validation", "None"])
    assert "splits are train and test" in refused(["evaluate", tmp_path / "run", "--split", "validation"], capsys)


def test_a_run_without_a_checkpoint(trained, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
    assert "has no checkpoint yet" in refused(["evaluate", tmp_path], capsys)


# --- Sweeps -----------------------------------------------------------------------------------------------------------

SWEEP = """
from bsvae_jax.config import MLP, Config
from bsvae_jax.sweeps.grid import Sweep
from bsvae_jax.objective import Constant, Optimal
def get_config():
    return Config(network=MLP((16,)), latent_size=4, epochs=1, batch_size=500, devices=1, decoder_variance=Optimal(floor=1e-3))
def get_sweep():
    return Sweep(beta=(1.0, 4.0), decoder_variance=(Optimal(floor=1e-3), Constant(0.1)), seeds=2)
"""


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("swept") / "grid.py"
    path.write_text(SWEEP)
    return path


@pytest.fixture(scope="module")
def swept(grid_file):
    """The whole grid: eight members, two programs."""
    main.main(["sweep", str(grid_file), "--workdir", str(grid_file.parent / "sweep")])
    return grid_file.parent / "sweep"


@pytest.fixture(scope="module")
def one_member(grid_file):
    """A sweep of one member."""
    folder = grid_file.parent / "one"
    lists = ["--beta", "4", "--seeds", "1", "--decoder-variance", "optimal"]
    main.main(["sweep", str(grid_file), "--workdir", str(folder), *lists])
    return folder


def members(folder):
    return sorted(path.name for path in (folder / "members").iterdir())


@pytest.mark.long
def test_sweep_trains_the_files_grid_and_leaves_the_report(swept):
    assert members(swept) == sorted(
        f"{variance}_beta{beta}_seed{seed}" for variance in ("optimal", "constant-0.1") for beta in (1, 4) for seed in (0, 1)
    )
    assert {"table.csv", "table.md", "members.csv", "report.html", "figures"} <= {path.name for path in swept.iterdir()}
    config = read_info(swept / "members" / "optimal_beta4_seed1").config
    assert (config.beta, config.seed, config.decoder_variance.floor) == (4.0, 1, 1e-3)


@pytest.mark.long
def test_lists_on_the_command_line_replace_the_files(swept, tmp_path):
    command = ["sweep", swept.parent / "grid.py", "--workdir", tmp_path / "sweep", "--beta", 0.5, "--seeds", 1, "--seed", 7]
    command += ["--decoder-variance", "constant", "optimal", "--decoder-variance.variance", 0.2, 0.3]
    command += ["--decoder-variance.over", "batch", "--learning-rate", 1e-3, 1e-2, "--latent-size", 3]
    main.main([str(part) for part in command])
    assert members(tmp_path / "sweep") == sorted(
        f"{variance}{rate}_beta0.5_seed7"
        for variance in ("constant-0.2", "constant-0.3", "optimal-batch")
        for rate in ("", "_rate0.01")
    )
    config = read_info(tmp_path / "sweep" / "members" / "optimal-batch_rate0.01_beta0.5_seed7").config
    assert (config.optimizer.learning_rate, config.latent_size) == (1e-2, 3)
    assert config.decoder_variance.floor == 1e-3  # the config file's own, for models of its kind


@pytest.mark.long
def test_members_are_runs_like_any_other(swept, capsys):
    member = swept / "members" / "constant-0.1_beta1_seed0"
    before = json.loads((member / "evaluation.json").read_text())["splits"]["test"]["rate"]["value"]
    main.main(["evaluate", str(member)])
    assert json.loads((member / "evaluation.json").read_text())["splits"]["test"]["rate"]["value"] == pytest.approx(before)
    main.main(["sample", str(member), "--count", "3", "--out", str(swept / "three.npz")])
    assert np.load(swept / "three.npz")["images"].shape == (3, 8, 8, 1)


@pytest.mark.long
def test_report_repeats_what_sweep_wrote(swept, capsys):
    main.main(["report", str(swept)])
    before = (swept / "table.csv").read_bytes()
    (swept / "table.csv").unlink()
    main.main(["report", str(swept)])
    assert (swept / "table.csv").read_bytes() == before
    printed = capsys.readouterr().out
    assert "8 of 8 members finished" in printed
    best = r"β-VAE, constant σ² = 0.1: of 2 values, β = [\d.]+ has the best calibrated ELBO on the validation images"
    assert re.search(best, printed)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--beta"], "A sweep needs at least one beta"),
        (["--beta", 1, 1.0], "beta names 1.0 twice"),
        (["--beta", 1, -1], r"beta must be a finite number >= 0, got -1\.0"),
        (["--beta", "nan"], "beta must be a finite number >= 0, got nan"),
        (["--beta", "one"], "one"),
        (["--seeds", 0], "seeds must be a whole number >= 1, got 0"),
        (["--decoder-variance"], "--decoder-variance needs at least one value"),
        (["--decoder-variance", "optimal", "optimal"], "--decoder-variance names optimal twice"),
        (["--decoder-variance", "optimel"], "optimel"),
        (["--decoder-variance", "optimal", "--decoder-variance.variance", 0.1], "which the sweep does not train"),
        (["--decoder-variance.variance", 0.1, 0.1], "twice"),
        (["--decoder-variance.variance", 0], "must be a finite number > 0, got 0"),
        (["--learning-rate", 0], "optimizer.learning_rate must be a finite number > 0"),
        (["--members-at-once", 0], "members_at_once must be a whole number >= 1, got 0"),
        (["--members-at-once", 2, "--execution", "loop"], "trains one member at a time"),
        (["--execution", "map"], "map"),
        (["--batch-size", 9999], "batch_size 9999 exceeds the 1350 training images"),
        (["--bta", 1], "--beta"),
    ],
)
def test_wrong_lists_are_answered_before_anything_is_written(options, sentence, grid_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(sentence, refused(["sweep", grid_file, *options], capsys))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_sweep(trained, grid_file, one_member, tmp_path, capsys):
    assert "is not a sweep: it has no sweep.json" in refused(["report", tmp_path], capsys)
    assert "is not empty and not a sweep" in refused(["sweep", grid_file, "--workdir", trained], capsys)
    text = refused(["sweep", grid_file, "--workdir", one_member, "--latent-size", 1], capsys)
    assert "holds a sweep of another config (latent_size: 4 -> 1)" in text
    assert "is a sweep, not a run: give one of its members" in refused(["sample", one_member], capsys)
    assert members(one_member) == ["optimal_beta4_seed0"]
    assert (one_member / "report.html").stat().st_size > 1000


@pytest.mark.long
def test_a_report_is_one_document(swept, capsys):
    main.main(["report", str(swept), "--json"])
    said = capsys.readouterr()
    found = json.loads(said.out, parse_constant=pytest.fail)
    assert [(row["split"], row["beta"], row["seeds"]) for row in found["table"]][:2] == [("test", 1.0, 2), ("test", 4.0, 2)]
    assert sorted(found["members"]) == members(swept)
    for name in members(swept)[:1]:
        evaluated = json.loads((swept / "members" / name / "evaluation.json").read_text())["splits"]
        assert found["members"][name] == evaluated
    assert "report: " in said.err


@pytest.mark.parametrize(
    ("network", "sentence"), [("mlp", "PyTorch version is of the residual network"), ("residual", "PyTorch is not installed")]
)
def test_a_peer_that_is_not_there_is_named_before_anything_is_measured(network, sentence, config_file, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("bsvae_jax.profiling.benchmark.measure", lambda *_: pytest.fail("measured"))
    assert sentence in refused(["bench", config_file, "--network", network, "--against", "torch"], capsys)


@pytest.mark.long
def test_a_measured_speed_is_one_document(config_file, capsys):
    main.main(["bench", str(config_file), "--seconds", "0.1", "--repeats", "1", "--json"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["torch"] == []
    assert (found["speed"]["batch_size"], len(found["speed"]["images_per_second"])) == (500, 1)
    assert found["speed"]["images_per_second"][0] > 0


@pytest.mark.long
def test_a_diverging_member_is_reported_at_the_end(swept, tmp_path, capsys):
    command = ["sweep", swept.parent / "grid.py", "--workdir", tmp_path / "sweep", "--beta", 1, "--seeds", 1, "--epochs", 3]
    command += ["--learning-rate", 1e-3, 1e30, "--decoder-variance", "optimal"]
    text = refused(command, capsys)
    assert "1 diverged: optimal_rate1e+30_beta1_seed0" in text
    assert "1 of 2 members finished, 1 diverged" in text


@pytest.mark.long
@pytest.mark.parametrize("command", ["train", "evaluate", "report"])
def test_a_figure_that_fails_ends_no_command(command, trained, swept, capsys, monkeypatch):
    def fail(*values, **options):
        raise ValueError("no such glyph")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    run = ["--workdir", trained]
    arguments = {"train": [trained.parent / "small.py", *run], "evaluate": [trained, "--split", "test"], "report": [swept]}
    main.main([command, *map(str, arguments[command])])
    said = capsys.readouterr()
    assert "Figures could not be drawn (ValueError: no such glyph)" in said.err
    assert "objective" in said.out or "finished" in said.out  # the numbers
