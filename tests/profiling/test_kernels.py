"""Kernels of a GPU's program, counted by hand on a text; and programs compiled for GPUs where JAX has CUDA."""

import dataclasses
import importlib.util
import re

import jax
import numpy as np
import pytest

from bsvae_jax.config import MLP, Config, Residual
from bsvae_jax.data import DataShape
from bsvae_jax.distributed.hardware import CHIPS
from bsvae_jax.errors import UserError
from bsvae_jax.profiling import aot, gpu_targets
from bsvae_jax.profiling.cost_analysis import ProgramCost
from bsvae_jax.profiling.kernels import kernels

PROGRAM = """HloModule jit_run_steps, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused_gather (param_0: u8[60000,784], param_1: s32[8,1]) -> f32[8,784] {
  %param_0 = u8[60000,784]{1,0} parameter(0)
  %param_1 = s32[8,1]{1,0} parameter(1)
  %gather.1 = u8[8,784]{1,0} gather(%param_0, %param_1), offset_dims={1}
  ROOT %convert.1 = f32[8,784]{1,0} convert(%gather.1)
}

%fused_reduce (param_0.1: f32[8,14,14,32]) -> (f32[32], f32[32]) {
  %param_0.1 = f32[8,14,14,32]{3,2,1,0} parameter(0)
  %zero = f32[] constant(0)
  %square = f32[8,14,14,32]{3,2,1,0} multiply(%param_0.1, %param_0.1)
  %reduce.1 = f32[32]{0} reduce(%param_0.1, %zero), dimensions={0,1,2}, to_apply=%sum
  %reduce.2 = f32[32]{0} reduce(%square, %zero), dimensions={0,1,2}, to_apply=%sum
  ROOT %tuple.1 = (f32[32]{0}, f32[32]{0}) tuple(%reduce.1, %reduce.2)
}

%fused_update (param_0.2: f32[100], param_1.2: f32[], param_2.2: s32[]) -> f32[100] {
  %param_0.2 = f32[100]{0} parameter(0)
  %param_1.2 = f32[] parameter(1)
  %bitcast.2 = f32[1]{0} bitcast(%param_1.2)
  %param_2.2 = s32[] parameter(2)
  ROOT %dynamic-update-slice.1 = f32[100]{0} dynamic-update-slice(%param_0.2, %bitcast.2, %param_2.2)
}

%fused_pad (param_0.3: bf16[8,7]) -> bf16[8,8] {
  %param_0.3 = bf16[8,7]{1,0} parameter(0)
  %zero.1 = bf16[] constant(0)
  ROOT %pad.1 = bf16[8,8]{1,0} pad(%param_0.3, %zero.1), padding=0_0x0_1
}

%fused_dot (param_0.4: f32[8,16], param_1.4: f32[16,4]) -> f32[8,4] {
  %param_0.4 = f32[8,16]{1,0} parameter(0)
  %param_1.4 = f32[16,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%param_0.4, %param_1.4), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%part (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p = (s32[], f32[10]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[10]{0} get-tuple-element(%p), index=1
  %twice = f32[10]{0} add(%x, %x), metadata={op_name="jit(run_steps)/while/body/add"}
  ROOT %next = (s32[], f32[10]{0}) tuple(%i, %twice)
}

%step (s: (s32[], f32[10])) -> (s32[], f32[10]) {
  %s = (s32[], f32[10]{0}, /*index=2*/u8[60000,784]{1,0}) parameter(0)
  %images = u8[60000,784]{1,0} get-tuple-element(%s), index=2
  %order = s32[8,1]{1,0} get-tuple-element(%s), index=3
  %x.1 = f32[8,28,28,1]{3,2,1,0} get-tuple-element(%s), index=4
  %k.1 = f32[32,3,3,1]{3,2,1,0} get-tuple-element(%s), index=5
  %b.1 = f32[32]{0} get-tuple-element(%s), index=6
  %loop_convert_fusion = f32[8,784]{1,0} fusion(%images, %order), kind=kLoop, calls=%fused_gather
  %conv.1 = (f32[8,14,14,32]{3,2,1,0}, u8[1000]{0}) custom-call(%x.1, %k.1, %b.1), window={size=3x3 stride=2x2 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward", \
metadata={op_name="jit(run_steps)/while/body/jvp(VAE.elbo_terms)/VAE/VAE.encode/encoder/stage0_block0/conv1/conv_general_dilated"}
  %y.1 = f32[8,14,14,32]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %input_reduce_fusion = (f32[32]{0}, f32[32]{0}) fusion(%y.1), kind=kInput, calls=%fused_reduce, \
metadata={op_name="jit(run_steps)/while/body/transpose(jvp(VAE.elbo_terms))/VAE/VAE.decode/decoder/block/norm1/reduce_sum"}
  %conv.2 = (f32[8,28,28,1]{3,2,1,0}, u8[0]{0}) custom-call(%y.1, %k.1), window={size=3x3 stride=2x2 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput", \
metadata={op_name="jit(run_steps)/while/body/jvp(VAE.elbo_terms)/VAE/VAE.decode/decoder/image/cond/branch_0_fun/conv_general_dilated"}
  %conv.3 = (f32[32,3,3,1]{3,2,1,0}, u8[0]{0}) custom-call(%x.1, %y.1), window={size=3x3 stride=2x2 pad=1_1x1_1}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %a.1 = f32[8,16]{1,0} get-tuple-element(%s), index=7
  %w.1 = f32[16,4]{1,0} get-tuple-element(%s), index=8
  %gemm_fusion = f32[8,4]{1,0} fusion(%a.1, %w.1), kind=kCustom, calls=%fused_dot
  %gemm = (f32[8,4]{1,0}, s8[4194304]{0}) custom-call(%a.1, %w.1), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %history = f32[100]{0} get-tuple-element(%s), index=9
  %value = f32[] get-tuple-element(%s), index=10
  %at = s32[] get-tuple-element(%s), index=0
  %update_fusion = f32[100]{0} fusion(%history, %value, %at), kind=kLoop, calls=%fused_update
  %narrow = bf16[8,7]{1,0} get-tuple-element(%s), index=11
  %pad_fusion = bf16[8,8]{1,0} fusion(%narrow), kind=kLoop, calls=%fused_pad
  %ten = f32[10]{0} get-tuple-element(%s), index=1
  %all-reduce-start = f32[10]{0} all-reduce-start(%ten), replica_groups={{0,1}}, to_apply=%sum
  %all-reduce-done = f32[10]{0} all-reduce-done(%all-reduce-start)
  %parts = (s32[], f32[10]{0}) tuple(%at, %all-reduce-done)
  %inner = (s32[], f32[10]{0}) while(%parts), condition=%more, body=%part, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %after = (s32[], f32[10]{0}) tuple(%inner)
}

%more (q: (s32[], f32[10])) -> pred[] {
  %q = (s32[], f32[10]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (state: f32[10]) -> f32[10] {
  %state = f32[10]{0} parameter(0)
  %copy.1 = f32[10]{0} copy(%state)
  %start = (s32[], f32[10]{0}) tuple(%copy.1)
  %while.1 = (s32[], f32[10]{0}) while(%start), condition=%more, body=%step
  ROOT %end = f32[10]{0} get-tuple-element(%while.1), index=1
}
"""


def by_name(program=PROGRAM):
    return {kernel.name: kernel for kernel in kernels(program)}


def test_a_step_is_the_loop_without_what_surrounds_it():
    """Ten launches and an inner loop of four; the copy before the loop, parameters and tuples are none."""
    found = by_name()
    assert "copy.1" not in found
    assert len(found) == 10 + 1
    assert sum(kernel.times for kernel in found.values()) == 10 + 4
    assert found["twice"].times == 4


def test_a_program_without_a_loop_over_steps_is_counted_whole():
    program = PROGRAM.replace(
        "%start), condition=%more, body=%step", '%start), body=%part, backend_config={"known_trip_count":{"n":"3"}}'
    )
    assert {name: kernel.times for name, kernel in by_name(program).items()} == {"copy.1": 1, "twice": 3}


def test_bytes_are_those_of_operands_and_results_and_of_slices_where_an_array_is_sliced():
    found = by_name()
    image, maps, weights = 8 * 28 * 28 * 4, 8 * 14 * 14 * 32 * 4, 32 * 9 * 4
    assert (
        found["loop_convert_fusion"].moved == 8 * 784 + 8 * 4 + 4 * 8 * 784
    )  # 8 rows of the 60,000, their indices, the result
    assert found["conv.1"].moved == image + weights + 4 * 32 + maps  # no scratch memory
    assert found["input_reduce_fusion"].moved == maps + 2 * 4 * 32
    assert found["update_fusion"].moved == 4 + 4 + 4  # in place: the value, where to, the element
    assert found["pad_fusion"].moved == 2 * (8 * 7 + 8 * 8)
    assert found["all-reduce-start"].moved == 2 * 40


def test_arithmetic_is_that_of_the_forward_convolution_in_all_three_passes():
    found = by_name()
    convolution = 2 * (8 * 14 * 14) * (9 * 32)
    assert [found[name].flops for name in ("conv.1", "conv.2", "conv.3")] == [convolution] * 3
    assert found["gemm_fusion"].flops == found["gemm"].flops == 2 * 8 * 16 * 4
    assert found["input_reduce_fusion"].flops == 0


def test_kinds_libraries_and_layers():
    found = by_name()
    assert {name: (kernel.kind, kernel.library) for name, kernel in found.items()} == {
        "loop_convert_fusion": ("data movement", None),
        "conv.1": ("convolutions", "cuDNN"),
        "input_reduce_fusion": ("reductions", None),
        "conv.2": ("convolutions", "cuDNN"),
        "conv.3": ("convolutions", "cuDNN"),
        "gemm_fusion": ("matrix products", None),
        "gemm": ("matrix products", "cuBLAS"),
        "update_fusion": ("data movement", None),
        "pad_fusion": ("data movement", None),
        "all-reduce-start": ("communication", None),
        "twice": ("elementwise", None),
    }
    layers = {name: kernel.layer for name, kernel in found.items() if kernel.layer}
    assert layers == {
        "conv.1": "encoder/stage0_block0/conv1",
        "input_reduce_fusion": "decoder/block/norm1 (backward)",
        "conv.2": "decoder/image",
    }
    assert (found["conv.1"].result, found["conv.1"].result_bytes) == ("f32[8,14,14,32]", 8 * 14 * 14 * 32 * 4)


def test_what_is_printed_of_kernels():
    step = ProgramCost(1e9, 1e9, 10, 20, 30, (), kernels(PROGRAM))
    lines = aot.kernel_lines(step)
    assert lines[0].split(": ")[1] == "3 of cuDNN, 1 of cuBLAS"
    assert "convolutions       3 kernels" in lines[1]
    table = aot.top_table(step, 2).splitlines()
    assert len(table) == 4
    assert table[2].startswith(
        "| conv.1 | convolutions | cuDNN | f32[8,14,14,32] | 2.27e+05 | 9.03e+05 | encoder/stage0_block0"
    )


def test_launches_bound_a_step_of_many_small_kernels():
    step = ProgramCost(1e9, 1e6, 10, 20, 30, (), kernels(PROGRAM))
    times = aot.roofline(step, CHIPS["Tesla T4"], "float32")
    assert times.launch == pytest.approx(14 * 3e-6)
    assert (times.bound, times.step) == ("arithmetic", pytest.approx(1e9 / 8.1e12))
    assert aot.roofline(step._replace(flops=1e6), CHIPS["Tesla T4"], "float32").bound == "launches"


def test_what_does_not_fit_names_the_largest_array_and_a_batch_that_would():
    step = ProgramCost(1e9, 1e9, 2**30, 0, 30 * 2**30, (), kernels(PROGRAM))
    sentence = aot._needs_more(step, float(16 * 2**30), 512, "512 images a step")
    assert "with 512 images a step (31.00 GiB of the 16.00 GiB that it may take)" in sentence
    assert (
        "The largest array is f32[8,14,14,32] (196.0 KiB), of encoder/stage0_block0/conv1. A smaller batch_size, about 256,"
        in sentence
    )


# --- GPUs that are not there ------------------------------------------------------------------------------------------


def test_targets_have_published_peaks_and_the_figures_of_the_programming_guide():
    for name, target in gpu_targets.TARGETS.items():
        text = gpu_targets.target_config(name)
        assert target.device_kind in CHIPS
        assert f'device_description_str: "{target.device_kind}"' in text
    text = gpu_targets.target_config("h100")
    assert re.search(r"shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448", text)
    assert re.search(r"core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800", text)
    assert re.search(r"memory_bandwidth: 3350000000000 device_memory_size: 80000000000", text)
    # The units, two operations each, give the published float32 rate but for rounding of the clock.
    for name in ("t4", "l4", "a100", "h100"):
        kind, architecture, multiprocessors, _, clock = gpu_targets.TARGETS[name]
        assert CHIPS[kind].float32 == pytest.approx(2e9 * clock * multiprocessors * architecture.float32_units, rel=0.01)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h10", r"no topology 'h10' .did you mean 'h100'\?.*t4 a100 l4 h100 h200"),
        ("h100x3", "A host has 1, 2, 4 or 8 GPUs, h100x3 asks for 3"),
        ("h100x", r"no topology 'h100x' .did you mean 'h100'"),
    ],
)
def test_a_gpu_that_does_not_exist_is_refused(topology, message):
    with pytest.raises(UserError, match=message):
        aot.machine(topology)


@pytest.mark.parametrize("lacking", ["cuda", "version"])
def test_cuda_that_is_not_there_is_asked_for(monkeypatch, lacking):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if lacking == "cuda" else object())
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 3))
    gpu_targets.gpu_devices.cache_clear()
    said = r"none here" if lacking == "cuda" else "this is JAX"
    with pytest.raises(UserError, match=rf"needs JAX 0.12.*{said}.*pip install -U 'bsvae_jax\[cuda\]' 'jax>=0.12'"):
        aot.machine("h100")


def _has_cuda():
    return jax.__version_info__ >= (0, 12) and importlib.util.find_spec("jax_cuda13_plugin") is not None


needs_cuda = pytest.mark.skipif(not _has_cuda(), reason="JAX is older than 0.12 or has no CUDA")
SMALL = Config(network=Residual((8,)), latent_size=4, batch_size=32)
TINY_IMAGES = DataShape((8, 8, 1), 256, np.dtype(np.uint8), 512, 128)
MNIST = DataShape((28, 28, 1), 256, np.dtype(np.uint8), 60_000, 10_000)
CELEBA = DataShape((64, 64, 3), 256, np.dtype(np.uint8), 162_770, 19_962)


@needs_cuda
@pytest.mark.long
@pytest.mark.parametrize("topology", [*gpu_targets.TARGETS, "h100x8"])
def test_a_small_network_compiles_for_every_gpu(topology):
    compiled = aot.compile_training(SMALL, TINY_IMAGES, topology)
    assert compiled.chip is CHIPS[gpu_targets.TARGETS[topology.removesuffix("x8")].device_kind]
    assert 0 < compiled.step.memory < compiled.memory
    assert {kernel.kind for kernel in compiled.step.kernels} >= {"convolutions", "reductions", "elementwise"}
    assert any(kernel.layer.startswith("decoder") for kernel in compiled.step.kernels)
    communicating = topology == "h100x8"
    assert bool(compiled.step.collectives) == communicating
    assert any(kernel.kind == "communication" for kernel in compiled.step.kernels) == communicating
    assert "without the autotuning" in aot.describe(compiled)


@needs_cuda
def test_bfloat16_is_refused_where_a_gpu_has_none():
    with pytest.raises(UserError, match="Tesla T4 has no bfloat16; train in float32"):
        aot.compile_training(dataclasses.replace(SMALL, precision="bfloat16"), TINY_IMAGES, "t4")


@needs_cuda
@pytest.mark.long
def test_a_batch_that_no_gpu_holds_is_refused_with_one_that_it_would():
    config = Config(network=MLP((32,)), latent_size=4, batch_size=2**25)
    with pytest.raises(UserError, match=r"does not fit.*of the 11\.\d\d GiB.*The largest array is f32.*batch_size, about \d+"):
        aot.compile_training(config, TINY_IMAGES._replace(train=2**26), "t4")


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "precision"), [("h100", "float32"), ("h100", "bfloat16"), ("t4", "float32"), ("h100x8", "float32")]
)
@pytest.mark.parametrize("which", ["mnist", "celeba"])
def test_programs_compile_for_gpus(topology, precision, which):
    config = Config(network=Residual((32, 64, 128)), latent_size=32, batch_size=512, precision=precision)
    if which == "celeba":
        config = dataclasses.replace(config, network=Residual((32, 64, 128, 256)), latent_size=256, batch_size=128)
    compiled = aot.compile_training(config, CELEBA if which == "celeba" else MNIST, topology)
    assert 0 < compiled.step.memory < compiled.memory
    assert compiled.step.launches < 600
    # Transposed convolutions are cuDNN's own too: every layer has one call forwards and two backwards, but for the gradient
    # of the images in the first two, and none is split in phases.
    layers = {"mnist": 15 + 2 + 3 + 1, "celeba": 20 + 2 + 4 + 1}[which]
    assert sum(kernel.kind == "convolutions" for kernel in compiled.step.kernels) == 3 * layers - 2
    assert (compiled.step.communicated > 0) == (topology == "h100x8")
