"""What a signal is answered: what is done next, also where that has changed since it came."""

import signal

import pytest

import bsvae_jax as bv
from bsvae_jax.config import MLP
from bsvae_jax.distributed.preemption import EVALUATING, TRAINING, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_answer_says_what_is_done_next(number, capfd):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        stop.expect(TRAINING)
        signal.raise_signal(number)
        assert signal.getsignal(number) is before  # a second one is not caught
        assert capfd.readouterr().err.count(f"{number.name}: {TRAINING}; Ctrl-C quits at once") == 1
        stop.expect(TRAINING)
        assert capfd.readouterr().err == ""
        stop.expect(EVALUATING)
        assert capfd.readouterr().err.count(f"{number.name}: {EVALUATING}; ") == 1
    assert stop.number == number
    with stop_on_signals() as stop:
        stop.expect(EVALUATING)
        assert capfd.readouterr().err == ""
        signal.raise_signal(number)
    assert capfd.readouterr().err.count(f"{number.name}: {EVALUATING}; ") == 1


class Signals(bv.Callback):
    def on_checkpoint(self, run, step, *_):
        if step == run.total_steps:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.long
def test_after_the_last_step_a_run_goes_on_to_its_end(tmp_path, capfd):
    config = bv.Config(network=MLP((8,)), latent_size=2, epochs=1, batch_size=500, devices=1)
    result = bv.fit(config, tmp_path / "run", progress=False, callbacks=[Signals()])
    assert set(result.report) == {"train", "test", "validation"}
    errors = capfd.readouterr().err
    assert f"SIGTERM: {EVALUATING}; " in errors
    assert TRAINING not in errors
