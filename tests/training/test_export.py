"""Encoder and decoder as programs that JAX runs without this package; weights as files are in `models/test_pytorch`."""

import subprocess
import sys

import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import bsvae_jax as bv
from bsvae_jax.cli.main import main
from bsvae_jax.config import MLP, Config, Residual
from bsvae_jax.errors import UserError

ALONE = """
import sys
import jax.export, numpy as np
encoder, decoder, inputs, outputs = sys.argv[1:]
x = np.load(inputs)
encode, decode = (jax.export.deserialize(bytearray(open(file, "rb").read())).call for file in (encoder, decoder))
mean, log_variance = encode(x)
np.savez(outputs, mean=mean, log_variance=log_variance, decoded=decode(mean), one=decode(mean[:1]))
assert not [name for name in sys.modules if name.partition(".")[0] in ("bsvae_jax", "flax", "optax", "orbax")]
"""


@pytest.mark.parametrize(
    "network", [MLP((8,)), pytest.param(Residual((4,)), marks=pytest.mark.long)], ids=lambda network: type(network).__name__
)
def test_programs_give_what_the_model_gives_in_a_process_that_has_only_jax(tmp_path, network):
    config = Config(network=network, latent_size=3, epochs=1, batch_size=500, devices=1)
    bv.fit(config, tmp_path / "run", progress=False)
    files = bv.export_stablehlo(tmp_path / "run", tmp_path / "programs")
    assert [file.name for file in files] == ["encoder.stablehlo", "decoder.stablehlo"]
    x = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
    np.save(tmp_path / "x.npy", x)
    script = [sys.executable, "-c", ALONE, *map(str, files), str(tmp_path / "x.npy"), str(tmp_path / "found.npz")]
    subprocess.run(script, check=True, cwd=tmp_path)
    found, run = np.load(tmp_path / "found.npz"), bv.restore(tmp_path / "run")
    posterior = run.model.apply(run.variables, jnp.asarray(x), method="encode")
    decoded = run.model.apply(run.variables, posterior.mean, method="decode")
    for name, expected in (("mean", posterior.mean), ("log_variance", posterior.log_variance), ("decoded", decoded.mean)):
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)  # compiled otherwise: rounding
    np.testing.assert_allclose(found["one"], decoded.mean[:1], rtol=1e-5, atol=1e-5)


def test_command_and_refusals(tmp_path, capsys):
    config = Config(
        network=MLP((8,)), decoder_variance=bv.config.Predicted(), latent_size=3, epochs=1, batch_size=500, devices=1
    )
    bv.fit(config, tmp_path / "run", progress=False)
    main(["export", str(tmp_path / "run"), "--format", "stablehlo"])
    said = capsys.readouterr().out
    assert "encoder.stablehlo" in said
    assert "decoder.stablehlo" in said
    content = (tmp_path / "run" / "stablehlo" / "decoder.stablehlo").read_bytes()
    mean, log_variance = jax.export.deserialize(bytearray(content)).call(jnp.zeros((2, 3)))
    assert (mean.shape, log_variance.shape) == ((2, 8, 8, 1), (2, 8, 8, 1))
    with pytest.raises(UserError, match=r"encoder.stablehlo exists; give another --out, or --overwrite to replace it"):
        bv.export_stablehlo(tmp_path / "run", tmp_path / "run" / "stablehlo")
    with pytest.raises(UserError, match="cannot be written"):
        bv.export_stablehlo(tmp_path / "run", "/dev/null/programs")
