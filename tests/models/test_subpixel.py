"""Convolutions of phases against sums written out in float64 NumPy."""

import jax
import numpy as np
import pytest

from bsvae_jax.models._subpixel import (
    convolve_dilated,
    convolve_phases,
    convolve_transposed,
    convolve_transposed_unordered,
    convolve_unordered,
    convolve_with_zeros,
    join_phases,
    transposed_phases,
)

RANDOM = np.random.default_rng(0)


def float32(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def phases_of(joined):
    """[B, 2h, 2w, C] to [4B, h, w, C], by picking rows and columns."""
    return np.concatenate([joined[:, rows::2, columns::2] for rows in (0, 1) for columns in (0, 1)])


def convolution(x, kernel):
    """3x3, stride 1, padding 1, in float64."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j].astype(np.float64) for i, j in np.ndindex(kernel.shape[:2])
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4)])
@pytest.mark.parametrize("features", [1, 3])
def test_convolving_phases_is_convolving_the_joined_map(size, features):
    joined = float32(2, 2 * size[0], 2 * size[1], 5)
    kernel = float32(3, 3, 5, features)
    found = convolve_phases(jax.numpy.asarray(phases_of(joined)), jax.numpy.asarray(kernel))
    np.testing.assert_allclose(found, convolution(joined, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_gradients_of_convolving_phases_are_those_of_the_joined_map():
    joined, kernel, cotangent = float32(2, 6, 8, 5), float32(3, 3, 5, 2), float32(2, 6, 8, 2)
    _, pullback = jax.vjp(convolve_phases, jax.numpy.asarray(phases_of(joined)), jax.numpy.asarray(kernel))
    of_phases, of_kernel = pullback(jax.numpy.asarray(cotangent))
    # The transposed map: flipped kernel, inputs and outputs exchanged.
    expected = phases_of(convolution(cotangent, kernel[::-1, ::-1].swapaxes(2, 3)))
    np.testing.assert_allclose(of_phases, expected, rtol=1e-5, atol=1e-5)
    padded = np.pad(joined.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i, j in np.ndindex(3, 3):
        expected = np.einsum("bhwc,bhwf->cf", padded[:, i : i + 6, j : j + 8], cotangent.astype(np.float64))
        np.testing.assert_allclose(of_kernel[i, j], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(4, 6), (3, 6), (3, 5)])
def test_joining_undoes_picking_phases_and_cuts(size):
    joined = float32(2, 4, 6, 3)
    np.testing.assert_array_equal(join_phases(jax.numpy.asarray(phases_of(joined)), size), joined[:, : size[0], : size[1]])


def transposed(x, kernel, size):
    """Each input through the kernel, added up in float64."""
    height, width = x.shape[1:3]
    summed = np.zeros((len(x), 2 * height + 2, 2 * width + 2, kernel.shape[-1]))  # with a margin that catches what falls off
    for i, j, k, l in np.ndindex(height, width, 3, 3):
        summed[:, 2 * i + k, 2 * j + l] += x[:, i, j].astype(np.float64) @ kernel[k, l].astype(np.float64)
    return summed[:, 1 : size[0] + 1, 1 : size[1] + 1]


def test_phases_of_a_transposed_convolution_scatter_each_input_through_the_kernel():
    x, kernel = float32(2, 3, 4, 5), float32(3, 3, 5, 2)
    found = join_phases(transposed_phases(jax.numpy.asarray(x), jax.numpy.asarray(kernel)), (6, 8))
    np.testing.assert_allclose(found, transposed(x, kernel, (6, 8)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (6, 7)])
@pytest.mark.parametrize("convolve", [convolve_dilated, convolve_with_zeros])
def test_the_forms_for_gpus_and_tpus_have_the_same_values_and_derivatives(convolve, size):
    """It is linear in both arguments: the derivative along any direction is it with that direction in place of the argument."""
    x, kernel, cotangent = float32(2, 3, 4, 5), float32(3, 3, 5, 2), float32(2, *size, 2)
    x_direction, kernel_direction = float32(2, 3, 4, 5), float32(3, 3, 5, 2)
    form = jax.jit(lambda x, kernel: convolve(x, kernel, size))
    np.testing.assert_allclose(form(x, kernel), transposed(x, kernel, size), rtol=1e-5, atol=1e-5)
    along = transposed(x_direction, kernel, size), transposed(x, kernel_direction, size)
    _, tangent = jax.jvp(form, (x, kernel), (x_direction, kernel_direction))
    np.testing.assert_allclose(tangent, sum(along), rtol=1e-5, atol=1e-4)
    of_x, of_kernel = jax.vjp(form, x, kernel)[1](jax.numpy.asarray(cotangent))
    np.testing.assert_allclose(np.vdot(of_x, x_direction), np.vdot(cotangent, along[0]), rtol=1e-4)
    np.testing.assert_allclose(np.vdot(of_kernel, kernel_direction), np.vdot(cotangent, along[1]), rtol=1e-4)


def test_members_of_a_stack_have_their_own_kernels_in_the_form_for_gpus():
    gradient = jax.grad(lambda kernel, x: (convolve_dilated(x, kernel, (4, 6)) ** 2).sum())
    x, kernels = jax.numpy.asarray(float32(2, 1, 2, 3, 2)), jax.numpy.asarray(float32(2, 3, 3, 2, 2))
    found = jax.jit(jax.vmap(gradient))(kernels, x)
    for member in range(2):
        np.testing.assert_allclose(found[member], gradient(kernels[member], x[member]), rtol=1e-4, atol=1e-4)


def test_each_platform_is_given_its_form():
    traced = jax.jit(lambda x, kernel: convolve_transposed(x, kernel, (6, 8))).trace(float32(2, 3, 4, 5), float32(3, 3, 5, 2))
    convolutions = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")
        for platform in ("cuda", "cpu", "tpu")
    }
    assert convolutions == {"cuda": 1, "cpu": 4, "tpu": 1}


def test_pixels_out_of_order_come_back_in_order():
    x, kernel, last = float32(2, 3, 4, 5), float32(3, 3, 5, 2), jax.numpy.asarray(float32(3, 3, 2, 1))
    pixels = jax.jit(convolve_transposed_unordered)(x, kernel)
    assert pixels.shape == (2, 6 * 8, 2)
    expected = transposed(x, kernel, (6, 8))
    np.testing.assert_allclose(np.sort(pixels, axis=None), np.sort(expected, axis=None), rtol=1e-4, atol=1e-4)
    found = jax.jit(lambda pixels: convolve_unordered(pixels, last, (6, 8)))(pixels)
    np.testing.assert_allclose(found, convolution(expected.astype(np.float32), np.asarray(last)), rtol=1e-4, atol=1e-4)
