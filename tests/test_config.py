"""Configs refuse what cannot be trained, with a sentence that names the field; they survive files unchanged.

Settings are tried as a user meets them, with the type checks of the test run switched off.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jaxtyping
import pytest

from bsvae_jax.config import (
    CHOICES,
    KINDS,
    MLP,
    MNIST,
    TFDS,
    Arrays,
    Augmentation,
    Config,
    Dataset,
    Digits,
    Flow,
    FlowMatching,
    Folder,
    Linear,
    Mixture,
    Network,
    Optimizer,
    Prior,
    Residual,
    Spatial,
    StandardNormal,
    VampPrior,
    changes,
    differences,
    from_dict,
    load_config,
    to_dict,
)
from bsvae_jax.data.datasets import moved, with_absolute_paths
from bsvae_jax.errors import UserError, nearest
from bsvae_jax.objective import (
    BetaSchedule,
    Capacity,
    Constant,
    ConstantBeta,
    Cyclical,
    DecoderVariance,
    FreeBits,
    Learned,
    LinearWarmup,
    Optimal,
    Predicted,
    TargetRate,
)

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))


@pytest.fixture(autouse=True)
def unchecked():
    """What a user runs: without it the type checker objects before the package's own sentence is reached."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- Ranges -----------------------------------------------------------------------------------------------------------

NEVER_NUMBERS = [math.nan, math.inf, -math.inf, True, False, "1", None]
NEVER_COUNTS = [-1, 1.0, 2.5, math.nan, math.inf, True, False, "1"]

# class, field, its name in the message, the bound it states, values just outside it
NUMBERS = [
    (Arrays, "holdout", "data.holdout", "> 0 and <= 0.9", [0.0, -0.1, 0.91, 1.0]),
    (Augmentation, "rotation_degrees", "augmentation.rotation_degrees", ">= 0 and <= 180", [-1e-6, 180.5]),
    (Optimizer, "learning_rate", "optimizer.learning_rate", "> 0", [0.0, -1e-3]),
    (Optimizer, "weight_decay", "optimizer.weight_decay", ">= 0", [-1e-9]),
    (Optimizer, "gradient_clip", "optimizer.gradient_clip", "> 0", [0.0, -1.0]),
    (Optimizer, "ema_decay", "optimizer.ema_decay", ">= 0 and <= 1", [-0.1, 1.0, 1.5]),
    (Config, "beta", "beta", ">= 0", [-1e-9]),
    (Config, "resident_memory", "resident_memory", ">= 0 and <= 1", [-1e-9, 1.01]),
    (Folder, "holdout", "data.holdout", "> 0 and <= 0.9", [0.0, 0.91]),
]
COUNTS = [
    (Arrays, "holdout_seed", "data.holdout_seed", 0),
    (Folder, "holdout_seed", "data.holdout_seed", 0),
    (Folder, "size", "data.size", 1),
    (TFDS, "crop", "data.crop", 1),
    (Optimizer, "cycles", "optimizer.cycles", 1),
    (Optimizer, "warmup_steps", "optimizer.warmup_steps", 0),
    (Config, "latent_size", "latent_size", 1),
    (Config, "epochs", "epochs", 1),
    (Config, "batch_size", "batch_size", 1),
    (Config, "evaluate_every", "evaluate_every", 1),
    (Config, "posterior_samples", "posterior_samples", 1),
    (Config, "steps_per_dispatch", "steps_per_dispatch", 1),
    (Config, "devices", "devices", 1),
    (Config, "seed", "seed", 0),
]
OPTIONAL = {"size", "crop", "gradient_clip", "ema_decay", "posterior_samples", "steps_per_dispatch", "devices"}


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        (kind, field, value, f"{name} must be a finite number {bound}, got {value!r}.")
        for kind, field, name, bound, outside in NUMBERS
        for value in [*outside, *NEVER_NUMBERS]
        if not (value is None and field in OPTIONAL)
    ],
)
def test_numbers_out_of_range(kind, field, value, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [
        (kind, field, value, f"{name} must be a whole number >= {low}, got {value!r}.")
        for kind, field, name, low in COUNTS
        for value in [*NEVER_COUNTS, None, *([0] if low else [])]
        if not (value is None and field in OPTIONAL)
    ],
)
def test_counts_out_of_range(kind, field, value, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Arrays, {"holdout": 1e-9}),
        (Arrays, {"holdout": 0.9}),
        (Arrays, {"holdout_seed": 0}),
        (Augmentation, {"rotation_degrees": 180}),
        (Augmentation, {"crop_scale": (0.08, 1.0), "crop_ratio": (0.75, 1.3333)}),
        (Augmentation, {"crop_scale": (0.5, 0.5), "crop_ratio": (3, 3)}),
        (MLP, {"hidden": (1,)}),
        (Residual, {"widths": (1, 1)}),
        (Optimizer, {"learning_rate": 1, "weight_decay": 0, "cycles": 1}),
        (Optimizer, {"schedule": "cosine_restarts", "warmup_steps": 0}),
        (Optimizer, {"schedule": "constant", "warmup_steps": 10, "gradient_clip": 1e-9, "ema_decay": 0}),
        (Optimizer, {"gradient_clip": None, "ema_decay": 0.99999}),
        (Config, {"beta": 0, "latent_size": 1, "epochs": 1, "batch_size": 1, "evaluate_every": 1, "seed": 0}),
        (Config, {"steps_per_dispatch": 1, "devices": 1, "precision": "bfloat16", "seed": 2**31}),
        (Config, {"steps_per_dispatch": None, "devices": None}),
    ],
)
def test_the_ends_of_the_ranges_belong(kind, values):
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


@pytest.mark.parametrize("field", ["crop_scale", "crop_ratio"])
@pytest.mark.parametrize(
    ("value", "telling"),
    [
        ((0.0, 1.0), "must be a finite number > 0"),
        ((-0.5, 1.0), "must be a finite number > 0"),
        ((0.8, 0.5), "must be a finite number >= 0.8"),
        ((math.nan, 1.0), "got nan"),
        ((0.5, math.nan), "got nan"),
        ((0.5, math.inf), "got inf"),
        (("0.5", 1.0), "got '0.5'"),
        ((0.5, True), "got True"),
        ((0.5,), "must be"),
        ((0.5, 0.6, 0.7), "must be"),
        (0.5, "must be"),
        (None, "must be"),
    ],
)
def test_crop_ranges(field, value, telling):
    with pytest.raises(UserError, match=f"augmentation.{field} .*{re.escape(telling)}"):
        Augmentation(**{field: value})


def test_a_crop_is_no_larger_than_the_image_but_may_be_wide():
    with pytest.raises(UserError, match=r"augmentation\.crop_scale must be a finite number >= 0\.5 and <= 1, got 1\.5"):
        Augmentation(crop_scale=(0.5, 1.5))
    assert Augmentation(crop_ratio=(0.5, 1.5)).crop_ratio == (0.5, 1.5)


@pytest.mark.parametrize(("kind", "field"), [(MLP, "hidden"), (Residual, "widths")])
@pytest.mark.parametrize(
    ("value", "telling"),
    [
        ((), "must be a tuple of at least one width"),
        ((8, 0), "must be a whole number >= 1, got 0"),
        ((-8,), "got -8"),
        ((8.0,), "got 8.0"),
        ((True,), "got True"),
        (("8",), "got '8'"),
        ((math.nan,), "got nan"),
        (8, "network"),
        ("8", "network"),
    ],
)
def test_layer_widths(kind, field, value, telling):
    with pytest.raises(
        UserError, match=f"network.{field}.*{re.escape(telling)}" if telling != "network" else f"network.{field}"
    ):
        kind(**{field: value})


@pytest.mark.parametrize(("kind", "field"), [(MLP, "hidden"), (Residual, "widths")])
def test_a_list_of_widths_is_a_tuple_or_refused(kind, field):
    """A config is hashable and equals its own reading from a file, so a list may not slip in."""
    try:
        config = Config(network=kind(**{field: [8, 4]}))
    except UserError:
        return
    assert hash(config) == hash(Config(network=kind(**{field: (8, 4)})))
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("make", "telling"),
    [
        (lambda: Optimizer(schedule="cosin"), "optimizer.schedule must be one of .*got 'cosin' \\(did you mean 'cosine'\\?\\)"),
        (lambda: Optimizer(schedule="step"), "optimizer.schedule must be one of cosine_restarts, cosine, constant, got 'step'"),
        (lambda: Optimizer(schedule=None), "optimizer.schedule must be one of .*got None"),
        (
            lambda: Optimizer(schedule="cosine_restarts", warmup_steps=1),
            "optimizer.warmup_steps needs schedule cosine or constant",
        ),
        (lambda: Config(precision="float16"), "precision must be one of float32, tensorfloat32, bfloat16, got 'float16'"),
        (lambda: Config(precision=32), "precision must be one of float32, tensorfloat32, bfloat16, got 32"),
        (lambda: Config(data="mnist"), "data must be an instance of a class derived from bsvae_jax.Dataset, got 'mnist'"),
        (lambda: Config(data=MNIST), "derived from bsvae_jax.Dataset, got the class MNIST; give an instance, MNIST\\(...\\)"),
        (
            lambda: Config(network=Optimal()),
            "network must be an instance of a class derived from bsvae_jax.Network, got Optimal",
        ),
        (
            lambda: Config(decoder_variance=0.5),
            "decoder_variance must be an instance of a class derived from bsvae_jax.DecoderVariance, got 0.5",
        ),
        (lambda: Config(prior=None), "prior must be an instance of a class derived from bsvae_jax.Prior, got None"),
        (lambda: Config(optimizer={"learning_rate": 1e-3}), "optimizer must be"),
        (lambda: Config(augmentation=None), "augmentation must be"),
        (lambda: Mixture(components=0), "prior.components must be a whole number >= 1, got 0"),
        (lambda: Mixture(covariance="ful"), "prior.covariance must be one of diagonal, full, got 'ful' \\(did you mean 'full'"),
        (lambda: VampPrior(pseudo_inputs=0), "prior.pseudo_inputs must be a whole number >= 1, got 0"),
        (lambda: VampPrior(pseudo_inputs=2.0), "prior.pseudo_inputs must be a whole number >= 1, got 2.0"),
        (lambda: Flow(layers=0), "prior.layers must be a whole number >= 1, got 0"),
        (lambda: Flow(width=-1), "prior.width must be a whole number >= 1, got -1"),
    ],
)
def test_choices(make, telling):
    with pytest.raises(UserError, match=telling):
        make()


# --- Config as a value ------------------------------------------------------------------------------------------------


def test_frozen_and_hashable():
    config = Config(network=MLP(hidden=(8, 4)), optimizer=Optimizer(ema_decay=0.9))
    same = Config(network=MLP(hidden=(8, 4)), optimizer=Optimizer(ema_decay=0.9))
    assert config == same
    assert hash(config) == hash(same)
    assert {config: 1}[same] == 1
    assert config != dataclasses.replace(config, seed=1)
    for part in (
        config,
        config.network,
        config.optimizer,
        config.augmentation,
        config.data,
        config.prior,
        config.decoder_variance,
    ):
        name = (dataclasses.fields(part) or [type("Field", (), {"name": "any"})])[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 1)


@pytest.mark.parametrize(
    ("field", "base", "expected"),
    [
        ("data", Dataset, {"digits": Digits, "mnist": MNIST, "arrays": Arrays, "folder": Folder, "tfds": TFDS}),
        ("network", Network, {"linear": Linear, "mlp": MLP, "residual": Residual, "spatial": Spatial}),
        (
            "decoder_variance",
            DecoderVariance,
            {"constant": Constant, "optimal": Optimal, "learned": Learned, "predicted": Predicted},
        ),
        (
            "prior",
            Prior,
            {
                "standard_normal": StandardNormal,
                "mixture": Mixture,
                "vamp": VampPrior,
                "flow": Flow,
                "flow_matching": FlowMatching,
            },
        ),
        (
            "beta_schedule",
            BetaSchedule,
            {
                "constant_beta": ConstantBeta,
                "linear_warmup": LinearWarmup,
                "cyclical": Cyclical,
                "capacity": Capacity,
                "target_rate": TargetRate,
            },
        ),
        ("optimizer", Optimizer, {"adamw": Optimizer}),
    ],
)
def test_choices_name_every_kind(field, base, expected):
    assert CHOICES[field] == expected
    assert KINDS[field] is base
    assert all(issubclass(kind, base) for kind in expected.values())
    assert set(CHOICES) == {"data", "network", "decoder_variance", "prior", "beta_schedule", "optimizer"}
    names = [name for choice in CHOICES.values() for name in choice]
    assert len(names) == len(set(names))  # `from_dict` and `to_dict` look a name up without its field


# --- Dictionaries -----------------------------------------------------------------------------------------------------

EVERY_KIND = [
    Config(),
    Config(data=MNIST(folder="a/b"), network=Linear(), decoder_variance=Constant(0.25), beta=0.5),
    Config(
        data=Arrays(path="x.npz", holdout=0.2, holdout_seed=3),
        network=Residual(widths=(4, 8)),
        decoder_variance=Learned(2.0, floor=1e-6),
    ),
    Config(
        data=TFDS(name="svhn", data_dir="d"), decoder_variance=Predicted(floor=0.01), optimizer=Optimizer(gradient_clip=1.0)
    ),
    Config(augmentation=Augmentation(10.0, (0.5, 1.0), (0.75, 1.5), True), decoder_variance=Optimal("pixel", 0.0), devices=4),
    Config(prior=Mixture(3, "full")),
    Config(prior=VampPrior(7)),
    Config(prior=Flow(2, 8)),
    Config(beta_schedule=LinearWarmup(7), free_bits=FreeBits(0.5, 4)),
    Config(beta_schedule=Cyclical(7, 0.25)),
    Config(beta_schedule=Capacity(20, 7)),
    Config(beta_schedule=TargetRate(20, 0.5)),
    Config(
        optimizer=Optimizer(schedule="constant", warmup_steps=7, ema_decay=0.9), precision="bfloat16", steps_per_dispatch=10
    ),
]


def test_to_dict_written_by_hand():
    config = Config(network=MLP(hidden=(8, 4)), decoder_variance=Constant(0.25), beta=2.0)
    assert to_dict(config) == {
        "data": {"kind": "digits", "validation": 0.1},
        "augmentation": {"rotation_degrees": 0.0, "crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "flip": False},
        "network": {"kind": "mlp", "hidden": [8, 4]},
        "latent_size": 16,
        "prior": {"kind": "standard_normal"},
        "decoder_variance": {"kind": "constant", "variance": 0.25},
        "beta": 2.0,
        "beta_schedule": {"kind": "constant_beta"},
        "free_bits": {"nats": 0.0, "group": 1},
        "optimizer": {
            "kind": "adamw",
            "learning_rate": 1e-3,
            "weight_decay": 1e-5,
            "schedule": "cosine",
            "cycles": 2,
            "warmup_steps": 0,
            "gradient_clip": None,
            "ema_decay": None,
            "skip_nonfinite": 0,
        },
        "epochs": 50,
        "batch_size": 128,
        "evaluate_every": 1,
        "posterior_samples": None,
        "precision": "float32",
        "gradient_accumulation": 1,
        "rematerialize": False,
        "steps_per_dispatch": None,
        "devices": None,
        "device_map": "shard_map",
        "resident_memory": 0.5,
        "seed": 0,
    }


@pytest.mark.parametrize("config", EVERY_KIND, ids=range(len(EVERY_KIND)))
def test_a_config_survives_json(config):
    again = from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert again == config
    assert hash(again) == hash(config)
    assert [type(getattr(again, name)) for name in CHOICES] == [type(getattr(config, name)) for name in CHOICES]


def test_from_dict_fills_in_what_is_left_out_and_leaves_its_input_alone():
    values = {"beta": 2.0, "network": {"kind": "mlp", "hidden": [8]}, "optimizer": {"cycles": 3}}
    copy = json.loads(json.dumps(values))
    assert from_dict(values) == Config(beta=2.0, network=MLP(hidden=(8,)), optimizer=Optimizer(cycles=3))
    assert values == copy


def test_a_run_from_before_there_was_a_validation_split_is_read_as_it_was_trained():
    assert from_dict({"data": {"kind": "digits"}}).data == Digits(validation=None)
    assert from_dict({"data": to_dict(Config())["data"]}).data == Digits(validation=0.1)


@pytest.mark.parametrize(
    ("values", "telling"),
    [
        ({"betta": 1.0}, "Config has no field 'betta' \\(did you mean 'beta'\\?\\)"),
        ({"xyzzy": 1.0}, "Config has no field 'xyzzy'\\.$"),
        ({"optimizer": {"learning_rat": 1.0}}, "Optimizer has no field 'learning_rat' \\(did you mean 'learning_rate'\\?\\)"),
        ({"augmentation": {"flop": True}}, "Augmentation has no field 'flop' \\(did you mean 'flip'\\?\\)"),
        ({"network": {"kind": "mlp", "widths": [8]}}, "MLP has no field 'widths'"),
        ({"decoder_variance": {"kind": "constant", "varience": 1.0}}, "Constant has no field .*did you mean 'variance'"),
        (
            {"network": {"kind": "resdual"}},
            "Unknown kind 'resdual' \\(did you mean 'residual'\\?\\); known: linear, mlp, residual",
        ),
        ({"network": {"kind": "optimal"}}, "Unknown kind 'optimal'"),
        ({"data": {"kind": "imagenet"}}, "Unknown kind 'imagenet'.*known: digits, mnist, arrays, folder, tfds"),
        ({"prior": {"kind": "normal"}}, "Unknown kind 'normal'.*known: standard_normal"),
        ({"network": {"hidden": [8]}}, "kind"),
        ({"network": {}}, "kind"),
        ({"beta": -1.0}, "beta must be a finite number >= 0, got -1.0"),
        ({"network": {"kind": "mlp", "hidden": []}}, "network.hidden must be a tuple of at least one width"),
    ],
)
def test_from_dict_refuses(values, telling):
    with pytest.raises(UserError, match=telling):
        from_dict(values)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Config(), Config(), []),
        (Config(), Config(beta=2.0), ["beta: 1.0 -> 2.0"]),
        (Config(beta=2.0), Config(), ["beta: 2.0 -> 1.0"]),
        (
            Config(seed=1, optimizer=Optimizer(learning_rate=0.5)),
            Config(seed=2, optimizer=Optimizer(learning_rate=0.25)),
            ["optimizer.learning_rate: 0.5 -> 0.25", "seed: 1 -> 2"],
        ),
        (Config(network=MLP((8,))), Config(network=MLP((8, 4))), ["network.hidden: [8] -> [8, 4]"]),
        (
            Config(network=MLP((8,))),
            Config(network=Linear()),
            ["network.hidden: [8] -> absent", "network.kind: mlp -> linear"],
        ),
        (
            Config(data=Digits()),
            Config(data=MNIST("m")),
            ["data.folder: absent -> m", "data.kind: digits -> mnist"],
        ),
        (Config(), Config(devices=2), ["devices: None -> 2"]),
    ],
)
def test_differences_name_the_dotted_fields(one, other, expected):
    assert differences(one, other) == expected


@dataclass(frozen=True)
class Elsewhere(Dataset):
    """A data set of one's own whose place has a name of its own."""

    bucket: str = "here"
    folder: int = 0

    @property
    def locations(self):
        return ("bucket",)

    def load(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (MNIST("here"), MNIST("there"), []),
        (Arrays("here.npz"), Arrays("there.npz"), []),
        (Arrays("here.npz"), Arrays("there.npz", holdout_seed=1), ["data.holdout_seed: 0 -> 1"]),
        (Folder("here", size=32), Folder("there", size=64), ["data.size: 32 -> 64"]),
        (TFDS("mnist", "here", "by hand"), TFDS("mnist"), []),
        (TFDS("mnist"), TFDS("cifar10"), ["data.name: mnist -> cifar10"]),
        (Elsewhere("here"), Elsewhere("there", 1), ["data.folder: 0 -> 1"]),
        (Digits(), MNIST(), ["data.folder: absent -> data/mnist", "data.kind: digits -> mnist"]),
    ],
)
def test_where_and_on_what_a_config_is_computed_is_no_part_of_it(one, other, expected):
    wanted = Config(data=other, devices=2, device_map="pmap", steps_per_dispatch=3, resident_memory=0.1)
    assert changes(Config(data=one), wanted) == expected


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (MNIST("a"), MNIST("/work/a")),
        (Arrays("/b.npz"), Arrays("/b.npz")),
        (Folder(""), Folder("")),
        (TFDS("mnist"), TFDS("mnist")),
        (TFDS("mnist", "gs://bucket", "a"), TFDS("mnist", "gs://bucket", "/work/a")),
        (Digits(), Digits()),
    ],
)
def test_saved_paths_do_not_depend_on_the_working_directory(source, found, monkeypatch):
    monkeypatch.setattr("os.getcwd", lambda: "/work")
    assert with_absolute_paths(source) == found


def test_a_config_may_import_its_neighbors_and_define_classes_whose_annotations_are_texts(tmp_path):
    (tmp_path / "base_of_a_test.py").write_text("from bsvae_jax import Config\ndef get_config(): return Config(beta=0.25)")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, replace\n"
        "from base_of_a_test import get_config as base\n"
        "from bsvae_jax.config import MLP\n"
        "@dataclass(frozen=True)\n"
        "class Wide(MLP):\n"
        "    times: int = 2\n"
        "def get_config():\n"
        "    return replace(base(), network=Wide((8,), times=3))\n"
    )
    before = list(sys.path)
    config = load_config(tmp_path / "mine.py")
    assert (config.beta, type(config.network).__name__, config.network.times) == (0.25, "Wide", 3)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert sys.path == before
    sys.modules.pop("base_of_a_test")


def test_data_that_have_moved_are_found_by_their_first_place():
    assert moved(TFDS("mnist"), Path("there")) == TFDS("mnist", "there")
    assert moved(Elsewhere(), "there") == Elsewhere("there")
    with pytest.raises(UserError, match="Digits are read from no file"):
        moved(Digits(), "there")


# --- Files ------------------------------------------------------------------------------------------------------------


def test_there_are_configs():
    assert {"digits", "mnist", "linear_mnist"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project(path):
    config = load_config(path)
    assert isinstance(config, Config)
    assert load_config(str(path)) == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def written(folder: Path, body: str) -> Path:
    path = folder / "experiment.py"
    path.write_text(f"from bsvae_jax.config import *\nfrom bsvae_jax.objective import *\n{body}\n")
    return path


def test_load_config_returns_what_the_file_says(tmp_path):
    body = "def get_config():\n    return Config(beta=3.0, decoder_variance=Constant(0.5), epochs=2)"
    assert load_config(written(tmp_path, body)) == Config(beta=3.0, decoder_variance=Constant(0.5), epochs=2)


@pytest.mark.parametrize(
    ("body", "telling"),
    [
        ("def config(): return Config()", "has no function get_config\\(\\)"),
        ("def get_config(): return None", "must return a bsvae_jax Config, got NoneType"),
        ("def get_config(): return {'beta': 1.0}", "must return a bsvae_jax Config, got dict"),
        ("def get_config(): return Config", "must return a bsvae_jax Config, got type"),
        ("def get_config(): return Config(betta=1.0)", "Config has no field 'betta' \\(did you mean 'beta'\\?\\)"),
        ("def get_config(): return Config(optimizer=Optimizer(lerning_rate=1.0))", "Optimizer has no .*mean 'learning_rate'"),
        ("def get_config(): return Config(network=MLP(hiden=(8,)))", "MLP has no field 'hiden' \\(did you mean 'hidden'\\?\\)"),
        ("def get_config(): return Config(decoder_variance=Optimal(flor=0.0))", "Optimal has no field .*mean 'floor'"),
        ("CONFIG = Config(betta=1.0)", "Config has no field 'betta'"),
        ("def get_config(): return Config(beta=-1.0)", "beta must be a finite number >= 0, got -1.0"),
    ],
)
def test_load_config_refuses(tmp_path, body, telling):
    with pytest.raises(UserError, match=telling):
        load_config(written(tmp_path, body))


@pytest.mark.parametrize("body", ["def get_config(): return len(3)", "def get_config(n): return Config()"])
def test_other_mistakes_keep_their_traceback(tmp_path, body):
    """A config is code; what is not about its fields is Python's to report."""
    with pytest.raises(TypeError):
        load_config(written(tmp_path, body))


def test_load_config_offers_the_nearest_file(tmp_path):
    written(tmp_path, "")
    with pytest.raises(UserError, match=r"There is no config file .*experimnt.py.*did you mean '.*experiment.py'"):
        load_config(tmp_path / "experimnt.py")


@pytest.mark.parametrize("path", ["no/such/folder/x.py", "", "."])
def test_load_config_without_a_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="There is no config file"):
        load_config(path)


def test_a_config_leaves_nothing_beside_it_and_an_edit_of_the_same_second_is_seen(tmp_path, monkeypatch):
    """Python's bytecode would be left there, and is known by the second and the size of its source alone."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for beta in (3.0, 4.0):
        path = written(tmp_path, f"def get_config(): return Config(beta={beta})")
        os.utime(path, (1e9, 1e9))
        assert load_config(path).beta == beta
    assert list(tmp_path.iterdir()) == [path]


def test_load_config_of_another_kind_of_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"is not a Python file; a config is a \.py file with get_config"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("bta", ["beta", "seed"], " (did you mean 'beta'?)"),
        ("zzz", ["beta", "seed"], ""),
        ("beta", [], ""),
        ("seeds", iter(["beta", "seed"]), " (did you mean 'seed'?)"),
    ],
)
def test_nearest(name, known, expected):
    assert nearest(name, known) == expected


def test_making_a_config_touches_no_device():
    """Nor does importing it: a cluster job may build configs on a machine without an accelerator."""
    code = (
        "import sys, jax; from bsvae_jax.config import Config, load_config; Config(); load_config(sys.argv[1]);"
        "jax.config.update('jax_num_cpu_devices', 3);"  # JAX raises here if a backend has been started
        "jax.config.update('jax_platforms', 'cpu'); assert len(jax.devices()) == 3"
    )
    subprocess.run([sys.executable, "-c", code, str(CONFIGS[0])], check=True, timeout=100)
