"""A folder for a model hub: read as a stranger does, by PyYAML, by the lines of its card, and by the commands."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml
from helpers import main, refused

import bsvae_jax as bv
from bsvae_jax.config import MLP, Arrays, Config
from bsvae_jax.errors import UserError
from bsvae_jax.training.evaluated import read_evaluation, write_evaluation
from bsvae_jax.training.hub import model_card


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The run and the folder of a model of an array file, whose path nobody else is to see."""
    folder = tmp_path_factory.mktemp("secret_place")
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 1), np.uint8)
    np.savez(folder / "dots.npz", train=images[:40], test=images[40:])
    data = Arrays(str(folder / "dots.npz"))
    config = Config(data=data, network=MLP((8,)), latent_size=2, epochs=1, batch_size=20, devices=1, beta=0.5)
    bv.fit(config, folder / "run", progress=False)
    main("export", folder / "run", "--format", "hub", "--out", folder / "vae-dots", "--license", "apache-2.0")
    return folder / "run", folder / "vae-dots"


def test_the_card_has_the_fields_of_the_hub_and_the_numbers_of_the_run(exported):
    run, out = exported
    front, text = re.fullmatch(r"---\n(.*?)---\n(.*)", (out / "README.md").read_text(), re.DOTALL).groups()
    front = yaml.safe_load(front)
    assert (front["license"], front["library_name"], front["datasets"]) == ("apache-2.0", "bsvae_jax", ["dots"])
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert "variational-autoencoder" in front["tags"]
    (model,) = front["model-index"]
    (result,) = model["results"]
    assert model["name"] == "vae-dots"
    assert result["task"]["type"] == "unconditional-image-generation"
    assert result["dataset"] == {"name": "dots", "type": "dots", "split": "test"}
    numbers = json.loads((run / "evaluation.json").read_text())["splits"]["test"]
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert found == {name: number["value"] for name, number in numbers.items()}
    assert "β = 0.5, decoder variance " in text
    error = numbers["calibrated_elbo"]["standard_error"]
    assert f"{numbers['calibrated_elbo']['value']:.5g} ± {error:.2g}" in text
    assert "2409.09361" in text


def test_numbers_of_a_fitted_prior_stay_with_the_run(exported, tmp_path):
    """The folder has the model's own prior, and nobody could repeat them."""
    shutil.copytree(exported[0], tmp_path / "run")
    step, report, _ = read_evaluation(tmp_path / "run")
    write_evaluation(tmp_path / "run", step, {"test": {"fitted_rate": report["test"]["rate"]}})
    out = bv.export_hub(tmp_path / "run", tmp_path / "out")
    for name in ("README.md", "evaluation.json"):
        assert "fitted_" not in (out / name).read_text()
    assert read_evaluation(out).report == report


def test_a_conditional_model_is_not_called_unconditional(exported):
    run, report = bv.restore(exported[0]), read_evaluation(exported[0]).report
    conditional = run._replace(config=dataclasses.replace(run.config, classes=3))
    card = model_card(conditional, "vae-dots", {"name": "dots"}, report)
    front = yaml.safe_load(card.split("---\n")[1])
    assert "pipeline_tag" not in front
    assert front["model-index"][0]["results"][0]["task"] == {"type": "other"}
    assert "unconditional" not in card
    assert "these are likelihoods of p(x|y), which no p(x) is to be compared with" in card
    assert "lower bound of log p(x\\|y), a density" in card
    assert "log p(x)" not in card
    assert "p(x|y)" not in model_card(run, "vae-dots", {"name": "dots"}, report)


def test_the_lines_of_the_card_load_the_model(exported, monkeypatch):
    run, out = exported
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(out)
    session: dict = {}
    exec(compile(code, "README.md", "exec"), session)
    assert session["samples"].shape == (16, 4, 4, 1)
    assert session["posterior"].mean.shape == (16, 2)
    original = bv.restore(run)
    opened = session["run"]
    jax.tree.map(np.testing.assert_array_equal, opened.variables, original.variables)
    assert (opened.step, opened.levels, opened.image_shape) == (original.step, original.levels, original.image_shape)
    np.testing.assert_array_equal(opened.calibration.variance_per_pixel, original.calibration.variance_per_pixel)
    assert opened.calibration.variance == original.calibration.variance


def test_nothing_of_this_machine_is_in_it(exported):
    _, out = exported
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "calibration.npz",
        "config.json",
        "evaluation.json",
        "model.safetensors",
    ]
    for path in out.iterdir():
        assert b"secret_place" not in path.read_bytes(), path
    assert json.loads((out / "config.json").read_text())["config"]["data"]["path"] == "dots.npz"


@pytest.mark.long
def test_commands_take_it_as_a_run(exported, tmp_path, capsys):
    run, out = exported
    for folder, name in ((run, "run.npz"), (out, "hub.npz")):
        main("sample", folder, "--count", 3, "--out", tmp_path / name)
    np.testing.assert_array_equal(np.load(tmp_path / "run.npz")["images"], np.load(tmp_path / "hub.npz")["images"])
    capsys.readouterr()
    data = ("--data.path", run.parent / "dots.npz")
    main("evaluate", out, "--split", "test", "--no-figures", "--json", *data)
    said = capsys.readouterr()
    document = json.loads(said.out, parse_constant=pytest.fail)
    assert "calibrated_elbo" in said.err
    main("evaluate", run, "--split", "test", "--no-figures", "--json")
    assert document["splits"] == json.loads(capsys.readouterr().out)["splits"]
    (summary,) = bv.list_runs(out)
    assert (summary.state, summary.step) == ("exported", 2)


@pytest.mark.long
def test_it_is_not_trained_but_another_run_begins_with_it(exported, tmp_path):
    run, out = exported
    config, before = bv.restore(run).config, sorted(path.name for path in out.iterdir())
    with pytest.raises(UserError, match=r"vae-dots was exported: it has no checkpoint to go on from.*--start-from"):
        bv.fit(dataclasses.replace(config, epochs=2), out, progress=False)
    assert sorted(path.name for path in out.iterdir()) == before
    begun = bv.fit(config, tmp_path / "begun", progress=False, start_from=out)
    assert json.loads((begun.workdir / "config.json").read_text())["started_from"]["step"] == 2


def test_what_is_wrong_is_said(exported, tmp_path, capsys):
    run, out = exported
    assert "vae-dots has model.safetensors, README.md" in refused(capsys, "export", run, "--format", "hub", "--out", out)
    assert "--license is for the model card" in refused(capsys, "export", run, "--license", "mit")
    assert "apache-2.0 or mit for example, got 'MIT License'" in refused(
        capsys, "export", run, "--format", "hub", "--out", tmp_path / "x", "--license", "MIT License"
    )
    assert "is the run itself" in refused(capsys, "export", run, "--format", "hub", "--out", run, "--overwrite")
    again = bv.export_hub(out, tmp_path / "again")  # of such a folder, without a license
    assert "license" not in yaml.safe_load((again / "README.md").read_text().split("---\n")[1])
    weights = safetensors.numpy.load_file(again / "model.safetensors")
    safetensors.numpy.save_file({name: array + 1 for name, array in weights.items()}, again / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors is damaged, or not of the config.json beside it; fetch or export"):
        bv.restore(again)
