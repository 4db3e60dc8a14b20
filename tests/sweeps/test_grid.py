"""Which members a sweep has, what they are called, and the sentence for every grid that is none."""

import dataclasses
import re

import pytest

from bsvae_jax.config import MLP, MNIST, Config, Optimizer, from_dict, to_dict
from bsvae_jax.errors import UserError
from bsvae_jax.objective import Constant, Learned, Optimal, Predicted
from bsvae_jax.sweeps.grid import Sweep, base_config, choose_variances, load_sweep, member_name

BASE = Config(network=MLP((16,)), latent_size=4, beta=7.0, seed=3, optimizer=Optimizer(learning_rate=2e-3))

pytestmark = pytest.mark.usefixtures("unchecked")


def refused(message, call, *arguments, **settings):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        call(*arguments, **settings)


# --- The product ------------------------------------------------------------------------------------------------------


def test_members_are_the_product_by_variance_rate_beta_and_seed():
    grid = Sweep(beta=(0.5, 2), decoder_variance=(Optimal("batch"), Constant(0.25)), seeds=2, learning_rate=(1e-3, 2e-3))
    members = grid.members(BASE)
    assert [member.name for member in members] == [
        "optimal-batch_rate0.001_beta0.5_seed3",
        "optimal-batch_rate0.001_beta0.5_seed4",
        "optimal-batch_rate0.001_beta2_seed3",
        "optimal-batch_rate0.001_beta2_seed4",
        "optimal-batch_beta0.5_seed3",
        "optimal-batch_beta0.5_seed4",
        "optimal-batch_beta2_seed3",
        "optimal-batch_beta2_seed4",
        "constant-0.25_rate0.001_beta0.5_seed3",
        "constant-0.25_rate0.001_beta0.5_seed4",
        "constant-0.25_rate0.001_beta2_seed3",
        "constant-0.25_rate0.001_beta2_seed4",
        "constant-0.25_beta0.5_seed3",
        "constant-0.25_beta0.5_seed4",
        "constant-0.25_beta2_seed3",
        "constant-0.25_beta2_seed4",
    ]
    # One of them, with every field replaced by hand.
    assert members[9].config == dataclasses.replace(
        BASE,
        decoder_variance=Constant(0.25),
        beta=0.5,
        seed=4,
        optimizer=dataclasses.replace(BASE.optimizer, learning_rate=1e-3),
    )
    assert members[6].config == dataclasses.replace(BASE, decoder_variance=Optimal("batch"), beta=2.0, seed=3)
    assert type(members[6].config.beta) is float  # config.json would say 2 and 2.0 for the same thing
    assert len({member.config for member in members}) == 16


def test_a_variance_may_have_betas_of_its_own():
    both = (Optimal(), Constant(0.5))
    grid = Sweep(beta=(1.0, 2.0), decoder_variance=both, seeds=1, own_beta=((Constant(0.5), (0.1,)),))
    names = [member.name for member in grid.members(BASE)]
    assert names == ["optimal_beta1_seed3", "optimal_beta2_seed3", "constant-0.5_beta0.1_seed3"]
    for own in (((Constant(0.1), (0.1,)),), ((Constant(0.5), ()),), ((Constant(0.5), (0.1, 0.1)),)):
        with pytest.raises(UserError, match="own_beta gives a decoder variance of the sweep at least one beta, each once; got"):
            Sweep(beta=(1.0,), decoder_variance=both, own_beta=own)


def test_the_papers_grid_is_the_default():
    members = Sweep().members(Config())
    assert len(members) == 5 * 2 * 5
    assert {member.config.beta for member in members} == {0.01, 0.1, 1.0, 10.0, 100.0}
    assert {member.config.decoder_variance for member in members} == {Optimal("example"), Constant(0.5)}
    assert {member.config.seed for member in members} == {0, 1, 2, 3, 4}
    assert {member.config.optimizer for member in members} == {Optimizer()}
    assert (members[0].name, members[-1].name) == ("optimal_beta0.01_seed0", "constant-0.5_beta100_seed4")


def test_a_grid_of_one():
    (member,) = Sweep(beta=(0.0,), decoder_variance=(Learned(),), seeds=1).members(BASE)
    assert member.name == "learned_beta0_seed3"
    assert member.config == dataclasses.replace(BASE, beta=0.0, decoder_variance=Learned())


def test_the_members_do_not_depend_on_what_the_base_says_of_them():
    """The base's own beta and variance are not trained unless the grid names them."""
    grid = Sweep(beta=(1.0,), decoder_variance=(Optimal(),), seeds=1)
    assert grid.members(BASE) == grid.members(dataclasses.replace(BASE, beta=1.0, decoder_variance=Predicted()))


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variance", "name"),
    [
        (Optimal(), "optimal"),
        (Optimal("example", floor=0.1), "optimal"),
        (Optimal("batch"), "optimal-batch"),
        (Optimal("pixel"), "optimal-pixel"),
        (Optimal("channel"), "optimal-channel"),
        (Constant(), "constant-0.5"),
        (Constant(1), "constant-1"),
        (Constant(1e-5), "constant-1e-05"),
        (Constant(0.1234567891), "constant-0.1234567891"),
        (Learned(), "learned"),
        (Learned(2.0), "learned"),
        (Predicted(), "predicted"),
    ],
    ids=str,
)
def test_variances_have_names(variance, name):
    assert variance.name == name


@pytest.mark.parametrize(
    ("changes", "rate", "name"),
    [
        ({}, 1e-3, "optimal_beta1_seed0"),
        ({"beta": 0.01}, 1e-3, "optimal_beta0.01_seed0"),
        ({"beta": 1e-7, "seed": 4294967295}, 1e-3, "optimal_beta1e-07_seed4294967295"),
        ({"beta": 123456789.0}, 1e-3, "optimal_beta123456789_seed0"),
        ({"beta": 1 / 3}, 1e-3, "optimal_beta0.3333333333_seed0"),
        ({}, 3e-4, "optimal_rate0.001_beta1_seed0"),
        ({"decoder_variance": Constant(0.1)}, 1.0, "constant-0.1_rate0.001_beta1_seed0"),
    ],
)
def test_members_have_names(changes, rate, name):
    assert member_name(dataclasses.replace(Config(), **changes), rate) == name


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        (Sweep(decoder_variance=(Optimal(), Optimal(floor=0.1)), beta=(1.0,), seeds=1), "optimal_beta1_seed3"),
        (Sweep(decoder_variance=(Learned(1.0), Learned(0.5)), beta=(1.0,), seeds=1), "learned_beta1_seed3"),
        (
            Sweep(decoder_variance=(Predicted(), Constant(), Predicted(0.1)), beta=(2.0, 1.0), seeds=2),
            "predicted_beta1_seed3",
        ),
    ],
    ids=["floor", "start", "among others"],
)
def test_members_of_one_name_are_refused(grid, name):
    refused(
        f"Two members would be called {name}: their decoder variances differ in the floor or the start only, "
        "which one sweep cannot hold; use another --workdir for the other.",
        grid.members,
        BASE,
    )


@pytest.mark.parametrize(
    "grid",
    [
        Sweep(beta=(1.0, 1.0 + 1e-12), decoder_variance=(Optimal(),), seeds=1),
        Sweep(beta=(1.0,), decoder_variance=(Constant(0.5), Constant(0.5 + 1e-13)), seeds=1),
    ],
    ids=["beta", "variance"],
)
def test_numbers_that_differ_beyond_their_name_are_refused(grid):
    with pytest.raises(UserError, match=r"^Two members would be called "):
        grid.members(BASE)


# --- What is no grid --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": ()}, "A sweep needs at least one beta, got ()."),
        ({"beta": [1.0]}, "A sweep needs at least one beta, got [1.0]."),
        ({"beta": 1.0}, "A sweep needs at least one beta, got 1.0."),
        ({"decoder_variance": ()}, "A sweep needs at least one decoder_variance, got ()."),
        ({"decoder_variance": Optimal()}, f"A sweep needs at least one decoder_variance, got {Optimal()!r}."),
        ({"learning_rate": 1e-3}, "A sweep needs at least one learning_rate, got 0.001."),
        ({"beta": (1.0, 2.0, 1.0)}, "beta names 1.0 twice; every member of a sweep is different."),
        ({"beta": (1, 1.0)}, "beta names 1.0 twice; every member of a sweep is different."),
        ({"learning_rate": (1e-3, 1e-3)}, "learning_rate names 0.001 twice; every member of a sweep is different."),
        (
            {"decoder_variance": (Constant(0.5), Optimal(), Constant())},
            f"decoder_variance names {Constant()!r} twice; every member of a sweep is different.",
        ),
        *(
            ({"seeds": seeds}, f"seeds must be a whole number >= 1, got {seeds!r}.")
            for seeds in (0, -1, 1.0, True, None, "3", (0, 1), float("nan"))
        ),
    ],
    ids=str,
)
def test_grids_are_refused(settings, message):
    refused(message, Sweep, **settings)


@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        ({"beta": (1.0, -0.5)}, BASE, "beta must be a finite number >= 0, got -0.5."),
        ({"beta": (float("nan"),)}, BASE, "beta must be a finite number >= 0, got nan."),
        ({"beta": (float("inf"),)}, BASE, "beta must be a finite number >= 0, got inf."),
        ({"learning_rate": (1e-3, 0.0)}, BASE, "optimizer.learning_rate must be a finite number > 0, got 0.0."),
        (
            {"seeds": 2},
            dataclasses.replace(BASE, seed=2**32 - 1),
            "seed must be a whole number >= 0 and <= 4294967295, got 4294967296.",
        ),
        (
            {"decoder_variance": (Optimal(), "constant")},
            BASE,
            "decoder_variance must be an instance of a class derived from bsvae_jax.DecoderVariance, got 'constant'.",
        ),
    ],
    ids=["negative beta", "beta nan", "beta infinite", "rate zero", "seed", "variance"],
)
def test_values_that_no_config_takes_are_refused(settings, config, message):
    refused(message, lambda: Sweep(**settings).members(config))


@pytest.mark.parametrize("beta", ["1", None, True], ids=str)
def test_a_beta_that_is_no_number_is_refused_in_a_sentence(beta):
    with pytest.raises(UserError, match="beta must be a finite number >= 0"):
        Sweep(beta=(beta,)).members(BASE)


# --- What one folder may hold -----------------------------------------------------------------------------------------


def test_the_base_says_all_that_a_sweep_does_not_vary():
    members = [
        *Sweep(beta=(0.1, 1.0), decoder_variance=(Constant(), Learned()), seeds=3).members(BASE),
        *Sweep(beta=(9.0,), seeds=1).members(dataclasses.replace(BASE, beta=2.0, seed=8, decoder_variance=Predicted())),
    ]
    assert {base_config(member.config) for member in members} == {base_config(BASE)}
    for change in ({"epochs": 3}, {"network": MLP((17,))}, {"batch_size": 7}, {"data": MNIST()}, {"latent_size": 5}):
        assert base_config(dataclasses.replace(BASE, **change)) != base_config(BASE), change
    assert from_dict(to_dict(base_config(BASE))) == base_config(BASE)


# --- The command line's choice of variances ---------------------------------------------------------------------------

DEFAULT = (Optimal("batch", floor=0.1), Constant(0.2))


@pytest.mark.parametrize(
    ("names", "variance", "over", "expected"),
    [
        (None, None, None, DEFAULT),
        (["constant"], None, None, (Constant(0.2),)),
        (["constant", "optimal"], None, None, DEFAULT[::-1]),
        (["learned"], None, None, (Learned(initial_variance=3.0),)),  # the config's own
        (["predicted", "optimal"], None, None, (Predicted(), DEFAULT[0])),
        (None, [0.1, 1.0], None, (DEFAULT[0], Constant(0.1), Constant(1.0))),
        (None, None, ["example", "pixel"], (Optimal("example", 0.1), Optimal("pixel", 0.1), DEFAULT[1])),
        (["optimal"], None, ["example"], (Optimal("example", 0.1),)),
        (["constant", "learned"], [2.0, 3.0], None, (Constant(2.0), Constant(3.0), Learned(initial_variance=3.0))),
    ],
)
def test_variances_are_chosen_by_name_and_setting(names, variance, over, expected):
    config = dataclasses.replace(BASE, decoder_variance=Learned(initial_variance=3.0))
    assert choose_variances(config, DEFAULT, names, variance, over) == expected


def test_the_config_files_several_models_of_a_kind_stay():
    default = (Optimal(), Constant(0.1), Constant(0.2), Optimal("batch"))
    chosen = choose_variances(BASE, default, None, None, None)
    assert sorted(map(str, chosen)) == sorted(map(str, default))
    assert choose_variances(BASE, default, None, [0.7], None) == (Optimal(), Optimal("batch"), Constant(0.7))


@pytest.mark.parametrize(
    ("names", "variance", "over", "message"),
    [
        ([], None, None, "--decoder-variance needs at least one value."),
        (None, [], None, "--decoder-variance.variance needs at least one value."),
        (None, None, [], "--decoder-variance.over needs at least one value."),
        (["optimal", "constant", "optimal"], None, None, "--decoder-variance names optimal twice."),
        (["optimal"], [0.1], None, "--decoder-variance.variance is for constant, which the sweep does not train."),
        (["learned"], None, ["batch"], "--decoder-variance.over is for optimal, which the sweep does not train."),
        (None, [0.0], None, "Constant.variance must be a finite number > 0, got 0.0."),
        (
            None,
            None,
            ["bach"],
            "over must be one of 'example', 'batch', 'pixel', 'channel', got 'bach' (did you mean 'batch'?).",
        ),
    ],
)
def test_choices_of_variances_are_refused(names, variance, over, message):
    refused(message, choose_variances, BASE, DEFAULT, names, variance, over)


# --- Files ------------------------------------------------------------------------------------------------------------


def written(folder, body):
    path = folder / "experiment.py"
    header = "from bsvae_jax.config import *\nfrom bsvae_jax.sweeps.grid import Sweep\nfrom bsvae_jax.objective import *\n"
    path.write_text(f"{header}def get_config():\n    return Config()\n{body}\n")
    return path


def test_a_file_says_its_sweep(tmp_path):
    path = written(tmp_path, "def get_sweep(): return Sweep(beta=(1.0,), decoder_variance=(Learned(),), seeds=2)")
    expected = Sweep(beta=(1.0,), decoder_variance=(Learned(),), seeds=2)
    assert load_sweep(path) == load_sweep(str(path)) == expected


def test_a_file_without_a_sweep_means_the_papers(tmp_path):
    assert load_sweep(written(tmp_path, "")) == Sweep((0.01, 0.1, 1.0, 10.0, 100.0), (Optimal(), Constant(0.5)), 5, ())


@pytest.mark.parametrize(
    ("body", "telling"),
    [
        ("def get_sweep(): return None", r"get_sweep\(\) of .*experiment\.py must return a bsvae_jax Sweep, got NoneType\."),
        ("def get_sweep(): return Config()", r"must return a bsvae_jax Sweep, got Config\."),
        ("def get_sweep(): return Sweep", r"must return a bsvae_jax Sweep, got type\."),
        ("def get_sweep(): return Sweep(beta=())", r"A sweep needs at least one beta, got \(\)\."),
    ],
)
def test_sweeps_of_files_are_refused(tmp_path, body, telling):
    with pytest.raises(UserError, match=telling):
        load_sweep(written(tmp_path, body))


@pytest.mark.parametrize(
    ("body", "telling"),
    [
        ("def get_sweep(): return Sweep(betas=(1.0,))", r"Sweep has no field 'betas' \(did you mean 'beta'\?\)\."),
        ("SWEEP = Sweep(seed=3)", r"Sweep has no field 'seed' \(did you mean 'seeds'\?\)\."),
    ],
)
def test_unknown_fields_of_a_sweep_are_named(tmp_path, body, telling):
    with pytest.raises(UserError, match=rf"experiment\.py: {telling}"):
        load_sweep(written(tmp_path, body))


def test_a_file_that_is_not_there(tmp_path):
    written(tmp_path, "")
    with pytest.raises(UserError, match=r"There is no config file .*experimnt\.py.*did you mean '.*experiment\.py'"):
        load_sweep(tmp_path / "experimnt.py")
