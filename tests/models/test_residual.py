"""The networks against torch.nn with copied weights, explicit NumPy loops, and layer lists summed by hand.

Errors are relative to the largest entry of the reference, which is always computed in float64. The tests against PyTorch skip
where it is not installed; nothing else needs it.
"""

from collections import OrderedDict

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import float64, normal, random_variables, relative_error

from bsvae_jax.config import MLP, Linear, Residual, Spatial
from bsvae_jax.models.layers import stage_size
from bsvae_jax.models.priors import StandardNormal
from bsvae_jax.models.residual import TransposedConvolution
from bsvae_jax.models.vae import VAE, build_vae
from bsvae_jax.objective import Predicted
from bsvae_jax.random import example_keys, normal_per_example
from bsvae_jax.training.step import TrainState, train_step

SHAPE, LATENT, BATCH = (5, 6, 2), 3, 8
NETWORKS = {"linear": Linear(), "mlp": MLP(hidden=(7, 4)), "residual": Residual(widths=(4,))}
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def built(network, shape=SHAPE, *, dtype=jnp.float32, axis_name=None):
    """Encoder and decoder, `(module, random variables, input)` each."""
    modules = network.build(LATENT, shape, 1, axis_name, dtype)
    plain = network.build(LATENT, shape)  # an average over a device axis cannot be traced outside of it
    inputs = normal(1, BATCH, *shape), normal(2, BATCH, LATENT)
    return [(m, random_variables(p, value), value) for m, p, value in zip(modules, plain, inputs, strict=True)]


# --- The transposed convolution ---------------------------------------------------------------------------------------

GEOMETRIES = [  # stride, input size, output size
    (1, (4, 4), (4, 4)),
    (1, (3, 5), (3, 5)),
    (1, (1, 2), (1, 2)),
    (2, (4, 4), (7, 7)),
    (2, (4, 4), (8, 8)),
    (2, (4, 4), (7, 8)),
    (2, (3, 5), (6, 9)),
    (2, (3, 5), (5, 10)),
    (2, (1, 1), (1, 2)),
]
every_geometry = pytest.mark.parametrize(("stride", "size", "out"), GEOMETRIES)


def transposed_convolution(stride, size, out):
    """A function of (x, kernel, bias), and values for them: 3 channels to 2, batch 2."""
    layer = TransposedConvolution(2, stride)
    values = normal(3, 2, *size, 3), normal(4, 3, 3, 3, 2), normal(5, 2)
    return lambda x, kernel, bias: layer.apply({"params": {"kernel": kernel, "bias": bias}}, x, out), values


@every_geometry
def test_transposed_convolution_scatters_each_input_through_the_kernel(stride, size, out):
    apply, (x, kernel, bias) = transposed_convolution(stride, size, out)
    exact_x, exact_kernel, exact_bias = (np.asarray(v, np.float64) for v in (x, kernel, bias))
    expected = np.zeros((2, *out, 2)) + exact_bias
    for i, j in np.ndindex(*size):
        for k, l in np.ndindex(3, 3):
            row, column = stride * i + k - 1, stride * j + l - 1
            if 0 <= row < out[0] and 0 <= column < out[1]:
                expected[:, row, column] += exact_x[:, i, j] @ exact_kernel[k, l]
    assert relative_error(apply(x, kernel, bias), expected) < 1e-6


@every_geometry
def test_transposed_convolution_and_its_gradients_are_pytorchs(stride, size, out):
    torch = pytest.importorskip("torch")
    apply, values = transposed_convolution(stride, size, out)
    cotangent = normal(6, 2, *out, 2)
    result, pullback = jax.vjp(apply, *values)
    x_gradient, kernel_gradient, bias_gradient = pullback(cotangent)

    x, kernel, bias, weights = (torch.tensor(np.asarray(v, np.float64)) for v in (*values, cotangent))
    padding = tuple(o - stride * (s - 1) - 1 for s, o in zip(size, out, strict=True))
    layer = torch.nn.ConvTranspose2d(3, 2, 3, stride, 1, output_padding=padding).double()
    layer.weight.data, layer.bias.data = kernel.permute(2, 3, 0, 1).contiguous(), bias  # torch: [in, out, 3, 3]
    x = x.permute(0, 3, 1, 2).requires_grad_()
    reference = layer(x).permute(0, 2, 3, 1)
    torch.sum(reference * weights).backward()

    assert relative_error(result, reference.detach()) < 1e-6
    assert relative_error(x_gradient, x.grad.permute(0, 2, 3, 1)) < 1e-6
    assert relative_error(kernel_gradient, layer.weight.grad.permute(2, 3, 0, 1)) < 1e-6
    assert relative_error(bias_gradient, layer.bias.grad) < 1e-6


# --- The whole residual network against PyTorch -----------------------------------------------------------------------


class TorchVAE:
    """The residual encoder and decoder in torch.nn, in float64 with random float32 weights and running statistics.

    Layers carry the names of the Flax ones, so `to_flax` needs rules for kinds of layers only.
    """

    def __init__(self, image_shape, widths, latent):
        self.torch = torch = pytest.importorskip("torch")
        nn = torch.nn

        class Block(nn.Module):
            def __init__(self, before, after, stride):
                super().__init__()
                self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after)
                self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1), nn.BatchNorm2d(after)
                self.change = stride != 1 or before != after
                if self.change:
                    self.shortcut_conv, self.shortcut_norm = nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after)
                self.act = nn.LeakyReLU(0.01)

            def forward(self, x):
                y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
                return self.act(y + (self.shortcut_norm(self.shortcut_conv(x)) if self.change else x))

        height, width, channels = image_shape
        sizes, before, encoder = [(height, width)], channels, OrderedDict()
        for stage, after in enumerate(widths):
            encoder[f"stage{stage}_block0"] = Block(before, after, 2)
            encoder[f"stage{stage}_block1"] = Block(after, after, 1)
            sizes.append(tuple((n + 2 * 1 - 3) // 2 + 1 for n in sizes[-1]))  # the formula of torch.nn.Conv2d
            before = after
        self.map = (widths[-1], *sizes[-1])  # (C, h, w)
        flat = int(np.prod(self.map))
        encoder["flatten"] = nn.Flatten()
        encoder["hidden"], encoder["hidden_norm"] = nn.Linear(flat, 2 * latent), nn.BatchNorm1d(2 * latent)
        encoder["act"] = nn.LeakyReLU(0.01)
        encoder["posterior"] = nn.Linear(2 * latent, 2 * latent)

        decoder = OrderedDict(hidden=nn.Linear(latent, flat), hidden_norm=nn.BatchNorm1d(flat), act=nn.LeakyReLU(0.01))
        decoder["unflatten"], decoder["block"] = nn.Unflatten(1, self.map), Block(widths[-1], widths[-1], 1)
        for stage, after in enumerate([*widths[-2::-1], widths[0]]):
            small, large = sizes[-1 - stage], sizes[-2 - stage]
            padding = tuple(o - (2 * (i - 1) - 2 + 3) for i, o in zip(small, large, strict=True))
            decoder[f"stage{stage}_conv"] = nn.ConvTranspose2d(before, after, 3, 2, 1, output_padding=padding)
            decoder[f"stage{stage}_norm"] = nn.BatchNorm2d(after)
            decoder[f"stage{stage}_act"] = nn.LeakyReLU(0.01)
            before = after
        decoder["image"] = nn.ConvTranspose2d(before, channels, 3, 1, 1)

        self.encoder, self.decoder = nn.Sequential(encoder).double(), nn.Sequential(decoder).double()
        self.randomize(np.random.default_rng(8))

    def norms(self):
        layers = [*self.encoder.modules(), *self.decoder.modules()]
        return [layer for layer in layers if isinstance(layer, self.torch.nn.modules.batchnorm._BatchNorm)]

    def randomize(self, rng):
        def fill(tensor, values):
            tensor.data = self.torch.tensor(values.astype(np.float32), dtype=self.torch.float64)

        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.ndim > 1:  # unit gain for a Linear or Conv2d; the order of a ConvTranspose2d's axes does not matter
                fill(parameter, rng.normal(size=parameter.shape) / np.sqrt(parameter[0].numel()))
            else:
                fill(parameter, rng.normal(size=parameter.shape) * 0.3)
        for norm in self.norms():
            fill(norm.weight, rng.uniform(0.5, 1.5, norm.weight.shape))
            fill(norm.running_mean, rng.normal(size=norm.weight.shape) * 0.3)
            fill(norm.running_var, rng.uniform(0.5, 1.5, norm.weight.shape))

    def __call__(self, x, z, train, noise=None):
        """Posterior mean and log-variance, and the image (NHWC) of `z`, or of the sample that `noise` makes."""
        encoder, decoder = self.encoder.train(train), self.decoder.train(train)
        mean, log_variance = encoder(self.tensor(x).permute(0, 3, 1, 2)).chunk(2, dim=1)
        z = self.tensor(z) if noise is None else mean + self.torch.exp(0.5 * log_variance) * self.tensor(noise)
        return mean, log_variance, decoder(z).permute(0, 2, 3, 1)

    def tensor(self, value):
        return self.torch.tensor(np.asarray(value, np.float64))

    def train_step(self, x, z, noise=None):
        """A forward pass in train mode whose running variances end as with the *biased* batch variance.

        PyTorch adds a tenth of the batch variance with n - 1 in the denominator (n = batch * height * width), Flax with n.
        """
        before, counts, hooks = {}, {}, []
        for norm in self.norms():
            before[norm] = norm.running_var.clone()
            count = lambda layer, inputs: counts.__setitem__(layer, inputs[0].numel() // inputs[0].shape[1])  # noqa: E731
            hooks.append(norm.register_forward_pre_hook(count))
        outputs = self(x, z, True, noise)
        for norm, old in before.items():
            unbiased = (norm.running_var - 0.9 * old) / 0.1
            norm.running_var = 0.9 * old + 0.1 * unbiased * (counts[norm] - 1) / counts[norm]
        for hook in hooks:
            hook.remove()
        return outputs

    def to_flax(self, read=lambda parameter: parameter, dtype=np.float32):
        """Flax variables `{"encoder", "decoder"}`, or with another `read` the gradients."""
        torch, trees = self.torch, {}

        def put(network, path, tensor):
            return jnp.asarray(self.reorder(network, path, tensor.detach().numpy()).astype(dtype))

        for network, root in (("encoder", self.encoder), ("decoder", self.decoder)):
            flat = {}
            for name, layer in root.named_modules():
                path = tuple(name.split("."))
                if isinstance(layer, torch.nn.Conv2d):
                    values = {"kernel": read(layer.weight).permute(2, 3, 1, 0), "bias": read(layer.bias)}
                elif isinstance(layer, torch.nn.ConvTranspose2d):
                    values = {"kernel": read(layer.weight).permute(2, 3, 0, 1), "bias": read(layer.bias)}
                elif isinstance(layer, torch.nn.Linear):
                    values = {"kernel": read(layer.weight).T, "bias": read(layer.bias)}
                elif isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                    values = {"scale": read(layer.weight), "bias": read(layer.bias)}
                    statistics = {"mean": layer.running_mean, "var": layer.running_var}
                    flat |= {("batch_stats", *path, k): put(network, path, v) for k, v in statistics.items()}
                else:
                    continue
                flat |= {("params", *path, k): put(network, path, v) for k, v in values.items()}
            trees[network] = unflatten_dict(flat)
        return trees

    def reorder(self, network, path, value):
        """The features of the flattened map from PyTorch's (C, h, w) to Flax's (h, w, C) order."""
        if network == "encoder" and path == ("hidden",) and value.ndim == 2:
            return value.reshape(*self.map, -1).transpose(1, 2, 0, 3).reshape(value.shape)
        if network == "decoder" and path in (("hidden",), ("hidden_norm",)):
            return value.reshape(-1, *self.map).transpose(0, 2, 3, 1).reshape(value.shape)
        return value


SETUPS = {  # image shape, widths, latent size
    "mnist": ((28, 28, 1), (32, 64, 128), 32),
    "celeba": ((64, 64, 3), (32, 64, 128, 256), 64),
    "odd": ((13, 22, 2), (4, 6, 5), 3),
}
every_setup = pytest.mark.parametrize(("shape", "widths", "latent"), SETUPS.values(), ids=SETUPS)


def apply_both(modules, variables, x, z, train):
    """Posterior mean, log-variance and image, and the updated statistics."""
    (mean, log_variance), e = modules[0].apply(variables["encoder"], x, train, mutable=["batch_stats"])
    image, d = modules[1].apply(variables["decoder"], z, train, mutable=["batch_stats"])
    return (mean, log_variance, image), {"encoder": e, "decoder": d}


@every_setup
def test_residual_vae_evaluates_as_in_pytorch(shape, widths, latent):
    reference, modules = TorchVAE(shape, widths, latent), Residual(widths).build(latent, shape)
    variables, x, z = reference.to_flax(), normal(9, 2, *shape), normal(10, 2, latent)
    for module, inputs, expected in zip(modules, (x, z), variables.values(), strict=True):  # these layers and no others
        made = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), inputs))
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, flatten_dict(expected))

    outputs, statistics = jax.jit(lambda v: apply_both(modules, v, x, z, False))(variables)
    for value, expected in zip(outputs, reference(x, z, train=False), strict=True):
        assert relative_error(value, expected.detach()) < 1e-4
    for network, kept in statistics.items():
        jax.tree.map(np.testing.assert_array_equal, kept["batch_stats"], variables[network]["batch_stats"])


@every_setup
def test_residual_vae_trains_as_in_pytorch(shape, widths, latent):
    reference, modules = TorchVAE(shape, widths, latent), Residual(widths).build(latent, shape)
    variables, x, z = reference.to_flax(), normal(11, 5, *shape), normal(12, 5, latent)
    outputs, statistics = jax.jit(lambda v: apply_both(modules, v, x, z, True))(variables)
    for value, expected in zip(outputs, reference.train_step(x, z), strict=True):
        assert relative_error(value, expected.detach()) < 1e-4
    after = flatten_dict(reference.to_flax())
    before = flatten_dict(variables)
    for path, value in flatten_dict(statistics).items():
        assert relative_error(value, after[path]) < 1e-4, path
        assert relative_error(before[path], after[path]) > 1e-2, path


def test_residual_vae_has_pytorchs_gradients_in_training():
    """In float64: in float32 a LeakyReLU input that rounds to the other side of zero moves a gradient by 1e-3."""
    shape, widths, latent = (7, 6, 2), (4, 3), 3
    reference = TorchVAE(shape, widths, latent)
    x, z = normal(13, 5, *shape), normal(14, 5, latent)
    weights = [normal(15, 5, latent), normal(16, 5, latent), normal(17, 5, *shape)]
    expected = reference.train_step(x, z)
    sum(
        (o * reference.torch.tensor(np.asarray(w, np.float64))).sum() for o, w in zip(expected, weights, strict=True)
    ).backward()
    with float64():
        modules = Residual(widths).build(latent, shape, dtype=jnp.float64)
        exact = flatten_dict(reference.to_flax(lambda parameter: parameter.grad, np.float64))
        variables = reference.to_flax(dtype=np.float64)
        x, z, *weights = (jnp.asarray(np.asarray(value, np.float64)) for value in (x, z, *weights))

        def loss(variables):
            outputs, _ = apply_both(modules, variables, x, z, True)
            return sum(jnp.sum(o * w) for o, w in zip(outputs, weights, strict=True))

        gradients = flatten_dict(jax.jit(jax.grad(loss))(variables))
        kernels = {path: value for path, value in gradients.items() if path[-1] == "kernel"}
    assert len(kernels) == (5 + 5 + 2) + (1 + 2 + 2 + 1)  # two stages, dense; dense, block, two stages, image
    for path, value in kernels.items():
        assert value.dtype == np.float64
        assert relative_error(value, exact[path]) < 1e-9, path


def test_training_is_pytorchs_step_by_step():
    """The same weights, batches and noise through AdamW, in float64; rounding grows from step to step.

    Parameters, running statistics and losses agree to 1e-10 after 1 step, and to 1e-7 after 100. Of a bias in front of a
    BatchNorm the gradient is rounding in PyTorch, which Adam scales up, and nothing here: 1e-6, also of the running means.
    """
    shape, widths, latent, batch = (7, 6, 1), (4, 3), 3, 6
    reference = TorchVAE(shape, widths, latent)
    parameters = [*reference.encoder.parameters(), *reference.decoder.parameters()]
    adamw = reference.torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
    images = np.random.default_rng(18).integers(0, 256, (100, batch, *shape)) / 255

    def step_in_pytorch(x, noise):
        mean, log_variance, decoded = reference.train_step(x, None, noise)
        variance = (reference.tensor(x) - decoded).square().flatten(1).mean(1) + 1 / (12 * 255**2)
        distortion = np.prod(shape) / 2 * (reference.torch.log(2 * np.pi * variance) + 1)
        rate = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)
        loss = (distortion + 0.5 * rate).mean()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        return loss.item()

    with float64():
        model = VAE(*Residual(widths).build(latent, shape, dtype=jnp.float64), prior=StandardNormal(latent))
        variables = reference.to_flax(dtype=np.float64)
        params, statistics = ({part: variables[part][kind] for part in variables} for kind in ("params", "batch_stats"))
        optimizer = optax.adamw(1e-3, weight_decay=1e-2)
        state = TrainState.create(model, optimizer, jax.random.key(0), jnp.asarray(images[0]))
        state = state.replace(params=params, batch_stats=statistics, optimizer_state=optimizer.init(params))
        step = jax.jit(train_step)
        for i, x in enumerate(images, 1):
            key = jax.random.key(i)
            noise = normal_per_example(example_keys(key, jnp.arange(batch)), (latent,))
            state, metrics = step(state, jnp.asarray(x), key, 0.5)
            tolerance = {1: 1e-10, 10: 1e-8, 100: 1e-7}.get(i, 1e-6)
            assert metrics.objective == pytest.approx(step_in_pytorch(x, noise), rel=tolerance), i
            if i in (1, 10, 100):
                expected = flatten_dict(reference.to_flax(dtype=np.float64))
                for kind, found in (("params", state.params), ("batch_stats", state.batch_stats)):
                    for (part, *path), value in flatten_dict(found).items():
                        idle = path[-1] == "mean" or (path[-1] == "bias" and ("conv" in path[-2] or path[-2] == "hidden"))
                        error = relative_error(value, expected[part, kind, *path])
                        assert error < (1e-6 if idle else tolerance), (i, part, path)


def test_the_network_starts_as_pytorchs_layers_do():
    """Kernels and biases uniform in +- 1 / sqrt(fan-in); the fan-in of a transposed convolution counts its outputs."""
    modules = Residual((24, 32)).build(16, (12, 12, 3))
    inputs = jnp.zeros((1, 12, 12, 3)), jnp.zeros((1, 16))
    keys = jax.random.split(jax.random.key(0))
    params = {name: jax.jit(m.init)(key, x)["params"] for name, m, x, key in zip("ed", modules, inputs, keys, strict=True)}
    checked = 0
    for path, kernel in flatten_dict(params).items():
        if path[-1] != "kernel":
            continue
        transposed = path[0] == "d" and (path[-2].startswith("stage") or path[-2] == "image")
        fan_in = np.prod(kernel.shape[:2]) * kernel.shape[-1] if transposed else np.prod(kernel.shape[:-1])
        bias = np.asarray(flatten_dict(params)[*path[:-1], "bias"])
        for values in (np.asarray(kernel).ravel(), bias):
            assert np.abs(values).max() <= fan_in**-0.5, path
        # The variance of N uniform numbers has the relative standard error sqrt(0.8 / N): six of them.
        assert 3 * fan_in * np.var(kernel) == pytest.approx(1.0, abs=6 * (0.8 / kernel.size) ** 0.5), path
        assert np.abs(bias).max() > 0.4 * fan_in**-0.5 or bias.size < 16, path
        checked += 1
    assert checked == (5 + 5 + 2) + (1 + 2 + 2 + 1)


# --- Linear and MLP against NumPy -------------------------------------------------------------------------------------


def dense(x, params):
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def silu(x):
    return x / (1.0 + np.exp(-x))


def test_linear_networks_are_affine():
    """`scale (W x + origin)` and `W (z / scale - origin) + b`; the log-variance is in units of sqrt(D), D = 60."""
    (encoder, e, x), (decoder, d, z) = built(Linear())
    (own, frame), (d_frame, d_mean) = (
        [jax.tree.map(np.float64, params[name]) for name in names]
        for params, names in ((e["params"], ("mean", "frame")), (d["params"], ("frame", "mean")))
    )
    mean, log_variance = encoder.apply(e, x)
    expected = np.exp(frame["log_scale"]) * (np.asarray(x).reshape(BATCH, 60) @ own["kernel"] + frame["origin"])
    assert relative_error(mean, expected) < 1e-6
    expected = np.sqrt(60) * np.float64(e["params"]["log_variance"]) + 2 * frame["log_scale"]
    np.testing.assert_allclose(log_variance, np.tile(expected, (BATCH, 1)), rtol=1e-6)
    expected = dense(np.asarray(z) / np.exp(d_frame["log_scale"]) - d_frame["origin"], d_mean).reshape(BATCH, *SHAPE)
    assert relative_error(decoder.apply(d, z), expected) < 1e-6


def test_linear_log_variance_does_not_depend_on_x():
    (encoder, variables, x), _ = built(Linear())
    jacobian = jax.jacobian(lambda x: encoder.apply(variables, x))(x)
    assert np.max(np.abs(jacobian[0])) > 0.1
    np.testing.assert_array_equal(jacobian[1], np.zeros((BATCH, LATENT, BATCH, *SHAPE)))


def test_mlp_is_dense_silu_layers_and_the_decoder_mirrors_them():
    (encoder, e, x), (decoder, d, z) = built(MLP(hidden=(7, 4)))
    kernels = [{name: layer["kernel"].shape for name, layer in v["params"].items()} for v in (e, d)]
    assert kernels[0] == {"Dense_0": (60, 7), "Dense_1": (7, 4), "posterior": (4, 6)}
    assert kernels[1] == {"Dense_0": (3, 4), "Dense_1": (4, 7), "mean": (7, 60)}

    def numpy_mlp(inputs, params, last):
        hidden = silu(dense(silu(dense(inputs, params["Dense_0"])), params["Dense_1"]))
        return dense(hidden, params[last])

    expected = numpy_mlp(np.asarray(x).reshape(BATCH, 60), e["params"], "posterior")
    mean, log_variance = encoder.apply(e, x)
    assert relative_error(mean, expected[:, :3]) < 1e-6
    assert relative_error(log_variance, expected[:, 3:]) < 1e-6
    expected = numpy_mlp(np.asarray(z), d["params"], "mean").reshape(BATCH, *SHAPE)
    assert relative_error(decoder.apply(d, z), expected) < 1e-6


# --- Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "stages", "expected"),
    [
        (28, 3, (28, 14, 7, 4)),
        (64, 4, (64, 32, 16, 8, 4)),
        (13, 3, (13, 7, 4, 2)),
        (1, 2, (1, 1, 1)),
        (8, 0, (8,)),
        (33, 5, (33, 17, 9, 5, 3, 2)),
    ],
)
def test_stage_sizes(size, stages, expected):
    assert tuple(stage_size(size, stage) for stage in range(stages + 1)) == expected


@pytest.mark.long
@pytest.mark.parametrize("network", [Linear(), MLP(hidden=(7, 4)), Residual(widths=(4, 6))], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 9, 3), (2, 17, 1), (28, 28, 1), (7, 4, 5)], ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_any_height_width_and_channels(network, shape, train):
    encoder, decoder = network.build(LATENT, shape)

    def run(module, inputs):
        variables = jax.jit(module.init)(jax.random.key(0), inputs)
        return module.apply(variables, inputs, train, mutable=["batch_stats"])[0]

    mean, log_variance = jax.eval_shape(lambda x: run(encoder, x), jnp.zeros((2, *shape)))
    image = jax.eval_shape(lambda z: run(decoder, z), jnp.zeros((2, LATENT)))
    assert (mean.shape, log_variance.shape, image.shape) == ((2, LATENT), (2, LATENT), (2, *shape))


@pytest.mark.long
@pytest.mark.parametrize("network", [*NETWORKS.values(), Spatial(widths=(2,), blocks=1, groups=1)], ids=str)
def test_a_free_batch_size_can_be_exported(network):
    latent = 30
    (count,) = jax.export.symbolic_shape("count")
    modules = network.build(latent, SHAPE)
    for module, shape in zip(modules, (SHAPE, (latent,)), strict=True):
        variables = random_variables(module, jnp.zeros((2, *shape)))
        exported = jax.export.export(jax.jit(module.apply))(variables, jax.ShapeDtypeStruct((count, *shape), jnp.float32))
        x = normal(6, 3, *shape)
        for value, expected in zip(
            jax.tree.leaves(exported.call(variables, x)), jax.tree.leaves(module.apply(variables, x)), strict=True
        ):
            assert relative_error(value, expected) < 1e-5


@every_network
def test_a_predicted_variance_doubles_the_decoders_channels_and_only_those(network):
    def decoder_shape(**variance):
        model = build_vae(network, LATENT, (5, 6, 2), **variance)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 5, 6, 2)), jax.random.key(1))
        last = shapes["params"]["decoder"]["image" if isinstance(network, Residual) else "mean"]
        return last["bias"].shape, sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]["encoder"]))

    (one,), encoder = decoder_shape()
    assert decoder_shape(decoder_variance=Predicted()) == ((2 * one,), encoder)
    assert one == (2 if isinstance(network, Residual) else 60)


@pytest.mark.parametrize("side", [28, 32, 64])
def test_up_to_64_pixels_there_are_the_papers_three_stages(side):
    assert Residual().for_data((side, side, 3)) == Residual((32, 64, 128))
    assert Residual().build(4, (side, side, 3)) == Residual((32, 64, 128)).build(4, (side, side, 3))
    assert Residual((8, 8)).for_data((side, side, 3)) == Residual((8, 8))  # chosen ones stay


@pytest.mark.parametrize(("shape", "stages", "smallest"), [((65, 40, 1), 4, (5, 3)), ((256, 256, 3), 5, (8, 8))])
def test_the_dense_layers_of_large_images_stay_small(shape, stages, smallest):
    """The weights of the layers around the coarsest map are counted by hand; nothing is computed."""
    encoder, _ = Residual().build(16, shape)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((2, *shape)))["params"]
    assert len([name for name in shapes if name.endswith("block0")]) == stages
    channels = [32, 64, 128, 256, 512][stages - 1]
    assert shapes["hidden"]["kernel"].shape == (smallest[0] * smallest[1] * channels, 32)
    assert len(Residual().widths_for((512, 512, 3))) == 6
    assert max(Residual().widths_for((4096, 4096, 3))) == 512


def test_parameters_of_the_mnist_network_counted_by_hand():
    def conv(kernel, before, after):
        return kernel * kernel * before * after + after

    def norm(features):
        return 2 * features

    blocks = [
        conv(3, 1, 32) + norm(32) + conv(3, 32, 32) + norm(32) + conv(1, 1, 32) + norm(32),
        2 * (conv(3, 32, 32) + norm(32)),
        conv(3, 32, 64) + norm(64) + conv(3, 64, 64) + norm(64) + conv(1, 32, 64) + norm(64),
        2 * (conv(3, 64, 64) + norm(64)),
        conv(3, 64, 128) + norm(128) + conv(3, 128, 128) + norm(128) + conv(1, 64, 128) + norm(128),
        2 * (conv(3, 128, 128) + norm(128)),
    ]
    assert blocks == [9_824, 18_624, 57_920, 74_112, 230_528, 295_680]
    encoder = sum(blocks) + (4 * 4 * 128 * 64 + 64) + norm(64) + (64 * 64 + 64)
    decoder = (32 * 2048 + 2048) + norm(2048) + blocks[-1]
    decoder += conv(3, 128, 64) + norm(64) + conv(3, 64, 32) + norm(32) + conv(3, 32, 32) + norm(32) + conv(3, 32, 1)
    assert (encoder, decoder) == (822_112, 469_409)

    modules = Residual((32, 64, 128)).build(32, (28, 28, 1))
    for module, shape, expected in zip(modules, ((28, 28, 1), (32,)), (encoder, decoder), strict=True):
        made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
        assert sum(leaf.size for leaf in jax.tree.leaves(made["params"])) == expected


# --- bfloat16 and devices ---------------------------------------------------------------------------------------------


@pytest.mark.long
@every_network
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_bfloat16_computes_with_float32_parameters_statistics_and_outputs(network, train):
    for (module, _, inputs), (exact_module, variables, _) in zip(
        built(network, dtype=jnp.bfloat16), built(network), strict=True
    ):

        def run(module, variables=variables, inputs=inputs):
            return jax.jit(lambda v, x: module.apply(v, x, train, mutable=["batch_stats"]))(variables, inputs)

        made = jax.eval_shape(module.init, jax.random.key(0), inputs)
        assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
        outputs, updates = run(module)
        exact, exact_updates = run(exact_module)
        assert {leaf.dtype for leaf in jax.tree.leaves((outputs, updates))} == {jnp.dtype("float32")}
        # bfloat16 rounds to 2^-9 = 0.002; a dozen roundings in a row and a largest-of-many leave a few per cent.
        errors = [relative_error(a, b) for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(exact), strict=True)]
        assert 1e-4 < max(errors) < 0.05
        for value, expected in zip(jax.tree.leaves(updates), jax.tree.leaves(exact_updates), strict=True):
            assert relative_error(value, expected) < 0.02


@pytest.mark.long
@pytest.mark.parametrize("part", [0, 1], ids=["encoder", "decoder"])
def test_batch_statistics_are_those_of_the_global_batch(part):
    devices, network = 4, NETWORKS["residual"]
    module, variables, inputs = built(network, axis_name="data")[part]
    whole, _, _ = built(network)[part]
    share = inputs.reshape(devices, -1, *inputs.shape[1:])
    offset = jnp.arange(devices, dtype=jnp.float32).reshape(-1, *[1] * (share.ndim - 1))
    share = share * (1 + offset) + offset  # every device sees quite other statistics
    together = share.reshape(inputs.shape)

    def apply(module):
        return lambda variables, x: module.apply(variables, x, True, mutable=["batch_stats"])

    lifted = jax.pmap(apply(module), "data", in_axes=(None, 0), devices=jax.devices()[:devices])
    outputs, updates = lifted(variables, share)
    expected, expected_updates = jax.jit(apply(whole))(variables, together)
    for value, exact in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        assert relative_error(value.reshape(exact.shape), exact) < 3e-5  # sums of other orders, cancelled layer after layer
    for value, exact in zip(jax.tree.leaves(updates), jax.tree.leaves(expected_updates), strict=True):
        for device in range(devices):
            assert relative_error(value[device], exact) < 1e-5
