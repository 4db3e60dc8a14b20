"""The page of a sweep's report: names are text, links lead somewhere, findings are a sentence, and who made it is said."""

import csv
import io
import json
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

from bsvae_jax.config import MLP, Config
from bsvae_jax.data import load
from bsvae_jax.evaluation.metrics import Quantity
from bsvae_jax.objective import Constant, Optimal
from bsvae_jax.sweeps import report, table
from bsvae_jax.sweeps.fit_sweep import _SweepDirectory
from bsvae_jax.sweeps.grid import Sweep
from bsvae_jax.sweeps.info import Call, SweepInfo, read_sweep
from bsvae_jax.sweeps.page import Picture, page
from bsvae_jax.sweeps.results import MemberResult, SweepResults

CALL = Call("2026-01-02 03:04 UTC", "bsvae sweep '<b>.py'", "2 x H100 & more (gpu)", "bsvae_jax 0.1.0, JAX 0.10.2")
VALUES = {"train": 0.1, "test": 0.2, "validation": 0.3}
INFO = SweepInfo(Config(), "<b>set</b>", "", (8, 8, 1), 17, None, [], (CALL,))


class Parsed(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def values(self, tag, name):
        return [attributes[name] for own, attributes in self.tags if own == tag and name in attributes]


def test_names_and_sentences_are_text():
    """Nothing that a user named becomes HTML, in an attribute neither."""
    odd = "<u> \"&amp;' #?%"
    failed = SweepResults(INFO, [], {f"optimal_{odd}": f"not {odd}"}, [f"late {odd}"], {})
    picture = Picture(None, f"alt {odd}", f"caption {odd}", [(12.5, 40.0, f"hint {odd}")])
    found = Parsed(page(failed, [f"sentence {odd}"], {f"name {odd}": picture}, {f"name {odd}": b"png"}))
    assert not {tag for tag, _ in found.tags} & {"u", "b"}
    assert found.values("img", "alt") == [f"alt {odd}"]
    assert found.values("i", "title") == [f"hint {odd}"]
    assert found.values("i", "style") == ["left:12.50%;top:40.00%"]
    for text in (f"sentence {odd}", f"caption {odd}", f"not {odd}", f"late {odd}", "<b>set</b>: 0 models", *CALL):
        assert text in found.text
    escaped = "%3Cu%3E%20%22%26amp%3B%27%20%23%3F%25"
    links = found.values("a", "href")
    assert {f"members/optimal_{escaped}/", f"figures/name%20{escaped}.png", f"figures/name%20{escaped}.pdf"} <= set(links)
    assert {"table.csv", "members.csv"} <= set(links)
    assert not any(link.startswith("members/late") for link in links)  # it has no folder yet


def test_the_page_needs_no_network_and_fits_a_phone():
    content = page(SweepResults(INFO, [], {}, [], {}), [], {}, {})
    found = Parsed(content)
    assert not found.values("script", "src")
    assert not [tag for tag, _ in found.tags if tag == "link"]
    assert "http" not in content
    assert "fetch" not in content
    assert "img { width: 100%" in content  # no figure is wider than the page
    assert found.text.count("querySelectorAll") == 1
    tables = [index for index, (tag, _) in enumerate(found.tags) if tag == "table"]
    assert len(tables) == 3
    assert all(found.tags[index - 1] == ("div", {"class": "scroll"}) for index in tables)


def test_one_model_is_over_nothing():
    one = [member(Optimal(), 1, 0)._replace(report={"test": {}, "train": {}})]
    assert "<h1>&lt;b&gt;set&lt;/b&gt;: 1 model</h1>" in page(SweepResults(INFO, one, {}, [], {}), [], {}, {})


def test_tables_have_every_split_and_no_heading_twice():
    reports = {
        split: {"variance": Quantity(v, None, "", ""), "rate": Quantity(2 * v, None, "", "")} for split, v in VALUES.items()
    }
    members = [member(Optimal(), beta, 0)._replace(report=reports) for beta in (1, 2)]
    found = SweepResults(INFO, members, {}, [], {})
    assert (found.splits, found.choosing_split) == (("test", "train", "validation"), "validation")
    headings, rows = table.display_rows(found, "validation")
    assert len(set(headings)) == len(headings)
    assert [dict(zip(headings, row, strict=True))["decoder variance [intensity²]"] for row in rows] == ["0.3"] * 2
    written = list(csv.DictReader(io.StringIO(table.as_csv(found))))
    assert [row["split"] for row in written] == ["test"] * 2 + ["train"] * 2 + ["validation"] * 2
    assert [float(row["rate_mean"]) for row in written] == [0.4] * 2 + [0.2] * 2 + [0.6] * 2
    assert [row["split"] for row in csv.DictReader(io.StringIO(table.members_csv(found)))] == list(found.splits) * 2
    titles = ["Test set", "Training set", "Validation set"]
    assert [line[4:] for line in table.as_markdown(found).splitlines() if line.startswith("### ")] == titles
    content = page(found, [], {}, {})
    assert [content.index(f"<h2>{title}</h2>") for title in titles] == sorted(
        content.index(f"<h2>{title}</h2>") for title in titles
    )
    without = [one._replace(report={split: reports[split] for split in ("test", "train")}) for one in members]
    assert table.as_csv(SweepResults(INFO, without, {}, [], {})) == table.as_csv(found).split("validation")[0]


def member(variance, beta, seed, *findings):
    return MemberResult(
        "m", Config(decoder_variance=variance, beta=float(beta), seed=seed), {}, dict.fromkeys(findings, ""), {}
    )


def test_a_finding_is_one_sentence_of_models_and_betas():
    collapse = "posterior collapse"
    members = [
        *(member(Optimal(), beta, seed, *([collapse] if beta == 100 else [])) for beta in (1, 10, 100) for seed in (0, 1)),
        *(member(Constant(0.5), beta, seed, *([collapse] if beta > seed else [])) for beta in (1, 10, 100) for seed in (0, 1)),
        member(Constant(0.1), 1, 0, "dead decoder"),
    ]
    assert report.findings(SweepResults(INFO, members, {}, [], {})) == [
        "Posterior collapse in 7 of 13 members: BS-VAE, optimal σ² per image at β = 100; "
        "β-VAE, constant σ² = 0.5 at β = 1 (1 of 2 seeds), 10 and 100.",
        "Dead decoder in 1 of 13 members: β-VAE, constant σ² = 0.1 at β = 1.",
    ]
    assert report.findings(SweepResults(INFO, members[:4], {}, [], {})) == []


def test_numbers_of_conditional_members_are_said_to_be():
    members = [member(Optimal(), 1, 0)._replace(report={"test": {}, "train": {}})]
    assert report.sentences(SweepResults(INFO, members, {}, [], {})) == []
    (said,) = report.sentences(SweepResults(INFO._replace(config=Config(classes=10)), members, {}, [], {}))
    assert "these are likelihoods of p(x|y)" in said


def test_a_sweep_notes_how_its_members_were_begun(tmp_path):
    config = Config(network=MLP((4,)), latent_size=2, epochs=1)
    images, folder = load(config.data), tmp_path / "sweep"
    begun = []
    for betas, devices in (((1.0,), "1 x cpu (cpu)"), ((1.0,), "8 x TPU v5e (tpu)"), ((1.0, 2.0), "2 x H100 (gpu)")):
        with _SweepDirectory(folder, config, images, Sweep(betas, (Optimal(),), 1).members(config), devices):
            begun.append(read_sweep(folder).calls)
    assert [[call.devices for call in calls] for calls in begun] == [["1 x cpu (cpu)"]] * 2 + [
        ["1 x cpu (cpu)", "2 x H100 (gpu)"]
    ]
    command = shlex.split(begun[0][0].command)
    assert command == [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    assert "JAX " in begun[0][0].versions


def test_a_sweep_of_which_nothing_was_noted_is_read(tmp_path):
    config = Config(network=MLP((4,)), latent_size=2, epochs=1)
    members = Sweep((1.0,), (Optimal(),), 1).members(config)
    with _SweepDirectory(tmp_path / "sweep", config, load(config.data), members, "1 x cpu (cpu)"):
        pass
    path = tmp_path / "sweep" / "sweep.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in ("calls", "digest")}))
    assert read_sweep(tmp_path / "sweep").calls == ()
