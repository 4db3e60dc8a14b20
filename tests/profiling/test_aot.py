"""What the compiler says of a program: rooflines and parsed collectives by hand, TPUs where libtpu is installed."""

import dataclasses
import importlib.util
import math

import numpy as np
import pytest

from bsvae_jax.config import MLP, Config, Digits, Optimizer, Residual
from bsvae_jax.data import DataShape, shape_of
from bsvae_jax.distributed.hardware import CHIPS, TOPOLOGIES, check_precision
from bsvae_jax.errors import UserError
from bsvae_jax.profiling import aot
from bsvae_jax.profiling.cost_analysis import Collective, ProgramCost, collectives

DIGITS = shape_of(Digits())
MNIST = DataShape((28, 28, 1), 256, np.dtype(np.uint8), 60_000, 10_000)
SMALL = Config(network=MLP((32,)), latent_size=4, batch_size=128)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def program_cost(**changes):
    values = dict(flops=1e12, bytes_accessed=1e9, arguments=10, results=20, temporary=30, collectives=()) | changes
    return ProgramCost(**values)


def test_the_roofline_by_hand():
    """v5e: 197e12 FLOP/s, 819e9 bytes/s, 1,600 Gbit/s; a ring of 4 passes each byte 1.5 times."""
    reduced = Collective("all-reduce", 3, 200_000_000)
    times = aot.roofline(program_cost(collectives=(reduced,)), CHIPS["TPU v5 lite"], "bfloat16", devices=4)
    assert times.compute == pytest.approx(1 / 197)
    assert times.memory == pytest.approx(1 / 819)
    assert times.network == pytest.approx(1.5 * 2e8 / 2e11)
    assert times.step == pytest.approx(1 / 197 + 1.5e-3)


def test_float32_takes_six_products_on_a_tpu_and_half_a_chip_has_half_its_peaks():
    times = aot.roofline(program_cost(), CHIPS["TPU v3"], "float32", devices_per_chip=2)
    assert times.compute == pytest.approx(1 / (123 / 6 / 2))
    assert times.memory == pytest.approx(1 / 450)
    assert times.network == 0.0


PROGRAM = """
  %all-reduce.1 = f32[32]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups={{0,1}}
  %ar = (f32[3,3,32,64]{3,2,1,0:T(8,128)}, bf16[10]{0:T(256)(128)(2,1)}) all-reduce-start(%a, %b), channel_id=2
  %ard = (f32[3,3,32,64]{3,2,1,0:T(8,128)}, bf16[10]{0}) all-reduce-done(%ar)
  %g = u8[4,7]{1,0} all-gather(%y), dimensions={0}
  %alone = f32[5]{0} all-reduce(%z), channel_id=3, replica_groups={{0},{1}}, to_apply=%add
  %also = f32[5]{0} all-reduce(%z), channel_id=3, replica_groups=[8,1]<=[8], to_apply=%add
  %named = f32[5]{0} all-reduce(%z), channel_id=3, replica_groups=mesh['member'=8,'data'=1] {'data'}, to_apply=%add
  %spread = f32[2,3]{0} all-reduce(%z), channel_id=4, replica_groups=mesh['member'=2,'data'=4] {'data'}, to_apply=%add
  %f = f32[5]{0} fusion(%all-reduce.1), calls=%c, metadata={op_name="psum all-reduce("}
"""


def test_collectives_are_counted_and_sized():
    gathered, reduced = collectives(PROGRAM)
    assert reduced == ("all-reduce", 3, 4 * 32 + 4 * 3 * 3 * 32 * 64 + 2 * 10 + 4 * 6)
    assert gathered == ("all-gather", 1, 28)


def test_a_program_for_this_machine_counts_the_arithmetic_of_its_matrices():
    """An MLP 64-32-8, 4-32-64: 2 FLOPs for each weight and image forwards, 4 backwards, but for the first layer's input."""
    compiled = aot.compile_training(SMALL, DIGITS, "cpu", devices=1)
    weights = 64 * 32 + 32 * 8 + 4 * 32 + 32 * 64
    products = 128 * (6 * weights - 2 * 64 * 32)
    assert products < compiled.step.flops < 1.35 * products  # the rest: activations, losses, the optimizer
    assert compiled.step.collectives == ()
    assert compiled.chip is None
    assert compiled.times() is None
    assert "no published peaks" in aot.describe(compiled)


@pytest.mark.long
def test_gradients_are_reduced_once_over_the_devices_and_by_no_more_bytes_on_more_of_them():
    communicated = {}
    for devices in (1, 2, 8):
        compiled = aot.compile_training(SMALL, DIGITS, "cpu", devices=devices)
        communicated[devices] = compiled.step.communicated
    parameters = 4 * (64 * 32 + 32 + 32 * 8 + 8 + 4 * 32 + 32 + 32 * 64 + 64)
    assert communicated[1] == 0
    assert parameters <= communicated[2] <= 1.01 * parameters  # and the metrics
    assert communicated[8] == communicated[2]


@pytest.mark.long
def test_members_spread_over_the_devices_do_not_communicate():
    compiled = aot.compile_training(SMALL, DIGITS, "cpu", devices=8, members=8)
    assert compiled.step.collectives == ()


def test_held_memory_is_that_of_the_arrays():
    config = dataclasses.replace(SMALL, optimizer=Optimizer(ema_decay=0.9))
    held = aot.compile_training(config, DIGITS, "cpu", devices=1).state
    parameters = 4 * (64 * 32 + 32 + 32 * 8 + 8 + 4 * 32 + 32 + 32 * 64 + 64)
    assert held["parameters"] == held["averaged parameters"] == parameters
    assert 2 * parameters <= held["optimizer"] <= 2 * parameters + 16
    assert held["images"] == 1350 * 64


def test_a_memory_that_is_given_bounds_the_batch():
    """Between what one batch and what its double take by the compiler; below the first it is refused, with a batch to try."""
    one, two = (aot.compile_training(dataclasses.replace(SMALL, batch_size=size), DIGITS, "cpu", 1) for size in (128, 256))
    assert one.memory == math.inf
    between = (one.step.memory + two.step.memory) / 2
    bounded = aot.compile_training(SMALL, DIGITS, "cpu", 1, 1, False, between)
    assert "largest" not in aot.describe(one)
    assert 170 <= aot.largest_batch(bounded, two, unit=1) <= 214  # 192 by the line, to the nearest of what is rounded
    with pytest.raises(aot.DoesNotFitError, match=r"with 256 images a step .*A smaller batch_size, about \d+, --gradient"):
        aot.compile_training(dataclasses.replace(SMALL, batch_size=256), DIGITS, "cpu", 1, 1, False, between)


def test_the_largest_batch_is_read_off_a_line():
    def of(batch, memory):
        step = program_cost(arguments=memory, results=0, temporary=0)
        return aot.Compiled("x", CHIPS["TPU v5 lite"], 4, 1, batch, 1, "float32", step, {}, 16 * 2**30)

    # 16 GiB = 100 MB + B * 1 MB
    largest = aot.largest_batch(of(100, 200_000_000), of(200, 300_000_000), unit=8)
    assert largest == math.floor((16 * 2**30 - 100_000_000) / 1_000_000) // 8 * 8


def test_where_the_double_does_not_fit_the_line_goes_through_the_half(monkeypatch):
    def compiled(config, *rest):
        if config.batch_size > 64:
            raise aot.DoesNotFitError("too large")
        if config.batch_size % 8:
            raise UserError("does not divide")
        step = program_cost(arguments=100 * 2**20 + config.batch_size * 2**25, results=0, temporary=0)
        return aot.Compiled("x", CHIPS["TPU v5 lite"], 4, 1, config.batch_size, 1, "float32", step, {}, 16 * 2**30)

    monkeypatch.setattr(aot, "compile_training", compiled)
    for batch, expected in ((32, 64), (64, 32)):
        config = dataclasses.replace(SMALL, batch_size=batch)
        other = aot.compile_other_batch(config, DIGITS, "x")
        assert other.batch_size == expected
        assert aot.largest_batch(compiled(config), other, unit=4) == (16 * 1024 - 100) // 32 // 4 * 4
    config = dataclasses.replace(SMALL, batch_size=72)
    assert aot.compile_other_batch(config, DIGITS, "x") is None
    assert aot.largest_batch(compiled(dataclasses.replace(SMALL, batch_size=8)), None, unit=4) is None


def test_one_image_a_step_has_no_half(monkeypatch):
    def compiled(config, *rest):
        raise aot.DoesNotFitError("too large")

    monkeypatch.setattr(aot, "compile_training", compiled)
    assert aot.compile_other_batch(dataclasses.replace(SMALL, batch_size=1), DIGITS, "x") is None


@pytest.mark.long
def test_members_and_devices_that_leave_a_batch_no_even_share():
    """5 members on 8 devices: 4 x 2 would halve 15 images, so it is 8 x 1, with three idle slots."""
    config = dataclasses.replace(SMALL, batch_size=15)
    compiled = aot.compile_training(config, DIGITS, "cpu", devices=8, members=5)
    assert compiled.step.collectives == ()
    assert compiled.state["parameters"] == 4 * (64 * 32 + 32 + 32 * 8 + 8 + 4 * 32 + 32 + 32 * 64 + 64)


def test_a_message_of_the_compiler_becomes_a_sentence():
    message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.
Used 33.27G of 15.75G hbm. Exceeded hbm capacity by 17.52G.

  Largest program allocations in hbm:

  1. Size: 12.25G
     Operator: op_type="convert" op_name="jit(step)/jvp(VAE.elbo_terms)/decoder/stage2_conv/concatenate" source_file="x.py"
     Shape: f32[4194304,28,28,1]{0,3,2,1:T(8,128)}
"""
    sentence = aot._does_not_fit(message, "8 images a step")
    assert "with 8 images a step (33.27G of 15.75G of hbm)" in sentence
    assert "The largest array is f32[4194304,28,28,1] (12.25G), of stage2_conv/concatenate." in sentence


@pytest.mark.parametrize(
    ("topology", "devices", "message"),
    [
        ("v5e:2by4", None, r"no topology 'v5e:2by4' .did you mean 'v5e:2x4'\?.*v6e: 2x2 2x4"),
        ("v9:2x2", None, r"no topology 'v9:2x2'.*v2: 2x2x1.*or cpu, gpu, tpu"),
        ("cpu", 99, "cpu has 8 devices, 99 were asked for"),
        ("gpu", None, "no gpu that JAX can use"),
    ],
)
def test_a_machine_that_does_not_exist_is_refused(topology, devices, message):
    with pytest.raises(UserError, match=message):
        aot.machine(topology, devices)


@pytest.mark.parametrize("precision", ["bfloat16", "tensorfloat32"])
def test_a_precision_is_refused_where_there_is_none(precision):
    check_precision(precision, "NVIDIA L4")
    check_precision("float32", "Tesla T4")
    check_precision(precision, "a chip that is not known")
    with pytest.raises(UserError, match=f"Tesla T4 has no {precision}; train in float32"):
        check_precision(precision, "Tesla T4")


@pytest.mark.parametrize(
    ("kind", "teraflops"),  # of the data sheets, without sparsity
    [("NVIDIA A100-SXM4-40GB", 156), ("NVIDIA H100 80GB HBM3", 494.5), ("TPU v5 lite", 197 / 3), ("Tesla T4", 8.1)],
)
def test_peaks_of_tensorfloat32(kind, teraflops):
    assert CHIPS[kind].peak("tensorfloat32") == pytest.approx(teraflops * 1e12)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="batch_size 100 does not divide over 8 devices; 96 would"):
        aot.compile_training(dataclasses.replace(SMALL, batch_size=100), DIGITS, "cpu")


def test_libtpu_that_is_not_there_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    aot._tpu_devices.cache_clear()
    with pytest.raises(UserError, match=r"needs libtpu.*bsvae_jax\[tpu\]"):
        aot.machine("v5e:2x2")


@needs_libtpu
def test_the_topologies_that_are_listed_exist():
    for kind, shapes in TOPOLOGIES.items():
        for shape in (shapes[0], shapes[-1], "1x1"):
            devices, per_chip = aot.machine(f"{kind}:{shape}")
            assert devices[0].device_kind in CHIPS
            assert len(devices) == per_chip * math.prod(int(n) for n in shape.split("x"))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v2:2x2x1", "v5e:2x4", "v6e:2x2"])
@pytest.mark.parametrize("which", ["mnist", "celeba", "sweep"])
def test_programs_compile_for_tpus(topology, which):
    config = Config(network=Residual((32, 64, 128)), latent_size=32, batch_size=512, precision="bfloat16")
    if which == "celeba":
        config = dataclasses.replace(config, network=Residual((32, 64, 128, 256)), latent_size=256)
    celeba = DataShape((64, 64, 3), 256, np.dtype(np.uint8), 162_770, 19_962)
    members = 8 if which == "sweep" else 1
    compiled = aot.compile_training(config, celeba if which == "celeba" else MNIST, topology, members=members)
    assert 0 < compiled.step.memory < compiled.memory
    assert compiled.images_per_second() > 10_000
    assert (compiled.step.communicated > 0) == (which != "sweep")
    assert "An estimate" in aot.describe(compiled)


@needs_libtpu
@pytest.mark.slow
def test_a_program_that_does_not_fit_says_what_would():
    config = Config(network=Residual((32, 64, 128)), latent_size=32, batch_size=2**21)
    shape = MNIST._replace(train=2**22)
    with pytest.raises(UserError, match=r"does not fit.*with 2097152 images a step.*A smaller batch_size"):
        aot.compile_training(config, shape, "v5e:1x1")
