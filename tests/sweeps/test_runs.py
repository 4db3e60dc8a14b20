"""What there is in a folder and how far it has come, of files written by hand; and runs side by side."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers import main, refused

from bsvae_jax._io.files import take_folder, write_json
from bsvae_jax.config import Config, Constant, to_dict
from bsvae_jax.errors import UserError
from bsvae_jax.evaluation.metrics import Quantity
from bsvae_jax.sweeps.comparison import compare_runs
from bsvae_jax.sweeps.runs import list_runs
from bsvae_jax.training.evaluated import write_evaluation

CONFIG = Config(epochs=3, batch_size=100, beta=0.5)


def begun(folder, config=CONFIG, **also):
    """The `config.json` of a run of 300 images, three steps an epoch."""
    folder.mkdir(parents=True)
    data = {"name": "dots", "image_shape": [8, 8, 1], "levels": 17, "train": 300, "test": 50, "fingerprint": "f"}
    values = {"format": 1, "config": to_dict(config), "data": data | also.pop("data", {}), **also}
    write_json(folder / "config.json", values)
    return folder


def trained(folder, steps, config=CONFIG, **also):
    """So many steps of nine, with the test row of every epoch."""
    begun(folder, config, **also)
    rows = [{"step": step, "epoch": 1 + (step - 1) // 3, "split": "train", "objective": 9.0} for step in range(1, steps + 1)]
    rows += [
        {"step": step, "epoch": step // 3, "split": "test", "objective": 7.5, "rate": 2.5}
        for step in (3, 6, 9)
        if step <= steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["step"])))
    return folder


def evaluated(folder, step=9, checkpoint="latest", **values):
    numbers = dict(objective=7.25, rate=2.0, calibrated_elbo=-8.0, calibrated_distortion=6.0, mse=0.125) | values
    quantities = {name: Quantity(value, 0.5, "nats", "a number") for name, value in numbers.items()}
    write_evaluation(folder, step, {"test": quantities}, checkpoint)
    return folder


def test_every_state_is_told_by_the_files(tmp_path):
    begun(tmp_path / "begun")
    trained(tmp_path / "interrupted", 4)
    evaluated(trained(tmp_path / "looked at", 6), 6)  # bsvae evaluate, in the middle
    evaluated(trained(tmp_path / "finished", 9))
    evaluated(evaluated(trained(tmp_path / "of the best", 9)), 6, "best", rate=77.0)  # which has a file of its own
    trained(tmp_path / "killed before its evaluation", 9)
    write_json(evaluated(trained(tmp_path / "early", 6), 6) / "stopped.json", {"step": 6, "reason": "no better"})
    write_json(trained(tmp_path / "diverged", 5) / "failure.json", {"step": 5, "error": "Step 5 is not finite."})
    begun(tmp_path / "from torch", imported={"file": "weights.pt"})
    begun(tmp_path / "own", dataclasses.replace(CONFIG, decoder_variance=Constant(0.1)))
    edited = begun(tmp_path / "edited") / "config.json"
    edited.write_text(edited.read_text().replace('"beta": 0.5', '"beta": 5.0'))
    text = json.loads((begun(tmp_path / "mine") / "config.json").read_text())
    text["config"]["network"] = {"kind": "mine:Attention", "heads": 3}
    write_json(tmp_path / "mine" / "config.json", text)  # a class that is not loaded
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with take_folder(trained(tmp_path / "deep" / "down" / "busy", 7), "training"):
        found = {str(run.folder.relative_to(tmp_path)): run for run in list_runs(tmp_path)}
    assert {name: (run.state, run.step) for name, run in found.items()} == {
        "begun": ("begun", 0),
        "interrupted": ("interrupted", 4),
        "looked at": ("interrupted", 6),
        "finished": ("finished", 9),
        "of the best": ("finished", 9),
        "killed before its evaluation": ("interrupted", 9),
        "early": ("finished", 6),
        "diverged": ("diverged", 5),
        "from torch": ("imported", 0),
        "own": ("begun", 0),
        "edited": ("damaged", None),
        "mine": ("begun", 0),
        "deep/down/busy": ("running", 7),
    }
    assert list(found) == sorted(found)
    assert found["finished"].progress() == "9 of 9"
    assert found["finished"].numbers == {"objective": 7.25, "rate": 2.0, "calibrated_elbo": -8.0}
    assert found["of the best"].numbers == found["finished"].numbers
    assert found["interrupted"].numbers == {"objective": 7.5, "rate": 2.5}  # its last epoch's
    assert found["own"].settings["decoder_variance"] == "constant-0.1"
    assert found["mine"].settings["network"] == "Attention"
    assert (found["early"].note, found["diverged"].note) == ("stopped early", "Step 5 is not finite.")
    assert "config.json is damaged" in found["edited"].note
    assert {run.state for run in list_runs(tmp_path / "deep")} == {"interrupted"}  # its lock is free again


def sweep_of(folder, *names):
    values = {"format": 1, "config": to_dict(CONFIG), "data": {"name": "dots"}, "members": list(names)}
    folder.mkdir()
    write_json(folder / "sweep.json", values)
    evaluated(trained(folder / "members" / "a", 9))
    return folder


def test_a_sweep_is_one_line_and_its_members_on_demand(tmp_path):
    folder = sweep_of(tmp_path / "sweep", "a", "b", "c")
    write_json(trained(folder / "members" / "b", 2) / "failure.json", {"step": 2, "error": "no"})
    (only,) = list_runs(tmp_path)
    assert (only.kind, only.state, only.progress(), only.note) == ("sweep", "interrupted", "1 of 3 members", "1 diverged")
    with take_folder(folder, "sweeping"):
        assert list_runs(folder)[0].state == "running"
    assert [run.folder.name for run in list_runs(folder, members=True)] == ["sweep", "a", "b"]
    evaluated(trained(folder / "members" / "c", 9))
    assert list_runs(folder)[0].state == "finished"


def test_the_command_prints_a_table_or_one_document(tmp_path, capsys):
    evaluated(trained(tmp_path / "runs" / "one", 9), rate=float("nan"))
    main("runs", tmp_path / "runs")
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == [
        "folder",
        "state",
        "steps",
        "data",
        "network",
        "σ²",
        "β",
        "seed",
        "objective",
        "rate",
        "calibrated",
        "ELBO",
    ]
    assert table[1].split()[:8] == ["one", "finished", "9", "of", "9", "dots", "mlp", "optimal"]
    main("runs", tmp_path / "runs", "--json")
    said = capsys.readouterr()
    (run,) = json.loads(said.out, parse_constant=pytest.fail)["runs"]  # NaN is no JSON
    assert said.err.splitlines() == table
    assert run["numbers"] == {"objective": 7.25, "rate": None, "calibrated_elbo": -8.0}
    assert (run["folder"], run["step"], run["settings"]["beta"]) == (str(tmp_path / "runs" / "one"), 9, 0.5)
    assert "There is no folder" in refused(capsys, "runs", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    main("runs", tmp_path / "empty")
    assert "There is no run in" in capsys.readouterr().out


@pytest.fixture
def pair(tmp_path):
    other = dataclasses.replace(CONFIG, beta=2.0, decoder_variance=Constant(0.25))
    evaluated(trained(tmp_path / "a", 9), fid=float("nan"))
    evaluated(trained(tmp_path / "b", 9, other), rate=1.0, calibrated_distortion=7.0)
    return tmp_path / "a", tmp_path / "b"


def test_a_comparison_says_what_differs_and_nothing_else(pair):
    comparison = compare_runs(pair)
    assert comparison.differences == {
        "decoder_variance.kind": ["optimal", "constant"],
        "decoder_variance.over": ["example", None],
        "beta": [0.5, 2.0],
        "decoder_variance.variance": [None, 0.25],
    }
    assert [quantity.value for quantity in comparison.quantities["rate"]] == [2.0, 1.0]
    assert [quantity and quantity.value for quantity in comparison.quantities["fid"]][1] is None
    assert comparison.notes == []
    lines = {line.split()[0]: line.split()[1:] for line in comparison.as_text().splitlines()[1:]}
    assert lines["beta"] == ["0.5", "2"]
    assert lines["rate"] == ["[nats]", "2", "±", "0.5", "1", "±", "0.5"]
    points = [
        [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines if line.get_marker() in "os"]
        for axes in comparison.figure().axes
    ]
    assert points == [[(2.0, 6.0), (1.0, 7.0)], [(2.0, 0.125), (1.0, 0.125)]]


def test_a_comparison_warns_of_what_cannot_be_compared(pair, tmp_path):
    begun(tmp_path / "new", data={"fingerprint": "g"})
    evaluated(evaluated(trained(tmp_path / "best", 9), rate=3.0), 6, "best", rate=77.0)
    comparison = compare_runs([*pair, tmp_path / "new", tmp_path / "best"])
    assert [note.partition(" ")[2][:40] for note in comparison.notes] == [
        "runs were trained on different data: the",
        "has no numbers of the test split yet; bs",
    ]
    assert [quantity and quantity.value for quantity in comparison.quantities["rate"]] == [2.0, 1.0, None, 3.0]
    with pytest.raises(UserError, match="No run is evaluated"):
        compare_runs([tmp_path / "new", begun(tmp_path / "newer")]).figure()


@pytest.mark.parametrize("names", [("_a", "_b"), ("a$x^{2$", "b")])
def test_any_name_of_a_folder_is_drawn(names, tmp_path, monkeypatch):
    """Matplotlib leaves names that begin with _ out of legends, and takes what is between two $ for a formula."""
    monkeypatch.chdir(tmp_path)
    for name in names:
        evaluated(trained(Path(name), 9))
    figure = compare_runs(names).figure()
    figure.canvas.draw()
    said = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert said == [name.replace("$", r"\$") if "$" in name else f"./{name}" if name[0] == "_" else name for name in names]


def test_the_command_prints_its_numbers_where_the_figure_fails(pair, tmp_path, capsys, monkeypatch):
    def fail(*values, **options):
        raise ValueError("no such glyph")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    main("compare", *pair, "--figure", tmp_path / "pair.png", "--json")
    said = capsys.readouterr()
    assert json.loads(said.out)["figure"] is None
    assert "Figures could not be drawn (ValueError: no such glyph)" in said.err
    assert "calibrated_elbo" in said.err


def test_a_config_file_that_prints_leaves_the_document_alone(pair, tmp_path, capsys):
    (tmp_path / "own.py").write_text("print('hello')")
    main("compare", *pair, "--config", tmp_path / "own.py", "--json")
    said = capsys.readouterr()
    assert json.loads(said.out)["runs"] == list(map(str, pair))
    assert said.err.startswith("hello\n")


def test_a_conditional_run_beside_one_that_is_not(tmp_path):
    """Of the same images: only the fingerprint of images and labels is another."""
    evaluated(trained(tmp_path / "a", 9))
    conditional = dataclasses.replace(CONFIG, classes=10)
    evaluated(trained(tmp_path / "b", 9, conditional, data={"fingerprint": "of images and labels"}))
    (note,) = compare_runs([tmp_path / "a", tmp_path / "b"]).notes
    assert "conditional on the class y are of p(x|y), which no p(x) is to be compared with" in note


def test_a_run_in_the_middle_shows_its_validation_images(tmp_path):
    path = trained(tmp_path / "run", 4) / "metrics.jsonl"
    path.write_text(path.read_text().replace('"test"', '"validation"'))
    assert list_runs(tmp_path)[0].numbers == {"objective": 7.5, "rate": 2.5}


def test_the_command_compares_draws_and_refuses(pair, tmp_path, capsys):
    figure = tmp_path / "figures" / "pair.png"
    main("compare", *pair, "--figure", figure, "--json")
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document["runs"] == list(map(str, pair))
    assert document["differences"]["beta"] == [0.5, 2.0]
    assert document["quantities"]["fid"][0] == {"value": None, "standard_error": 0.5, "unit": "nats", "meaning": "a number"}
    assert document["figure"] == str(figure)
    assert figure.stat().st_size > 1000
    assert "exists; give another --figure" in refused(capsys, "compare", *pair, "--figure", figure)
    assert "must end in .png" in refused(capsys, "compare", *pair, "--figure", "pair.gif")
    assert "at least two different runs, got 1" in refused(capsys, "compare", pair[0])
    assert "at least two different runs, got 1" in refused(capsys, "compare", pair[0], pair[0])
    assert "is not a run" in refused(capsys, "compare", pair[0], tmp_path / "nowhere", "--json")
    sweep = sweep_of(tmp_path / "sweep", "a")
    assert "is a sweep, not a run: give one of its members" in refused(capsys, "compare", pair[0], sweep)
    assert capsys.readouterr().out == ""
