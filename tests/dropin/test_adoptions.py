"""Real kinds of scripts with `grow_batch_size`: no worse at equal examples, and in fewer steps.

One seed each, and fewer examples than in `tests/experiments/adoptions.py`, whose three seeds lie 0.01 apart
(digits) and 0.02 (text). Tolerances are a few times that.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

import adabatch_jax as adabatch
from tests.dropin.scripts import gpt, resnet, trainer


def after_no_worse_than_before(script, examples, *, within, steps, **options):
    """Both runs; `steps` is the largest part of the steps that may be left."""
    before = script.run(script.before(examples), script.HANDED_IN["before"], 0, examples)
    after = script.run(script.after(examples), script.HANDED_IN["after"], 0, examples, **options)
    print(*(f"loss {r['loss']:.4f} in {r['steps']} steps" for r in (before, after)), sep="; ")
    assert after["loss"] < before["loss"] + within
    assert after["steps"] <= steps * before["steps"]
    return before, after


def examples_of(state):
    return int(adabatch.metrics(state)["num_examples"])


@pytest.mark.slow
def test_a_trainer_that_knew_multi_steps():
    """It logs `gradient_step` and `mini_step`, and hands in no loss."""
    examples = 4_800
    before, after = after_no_worse_than_before(trainer, examples, within=0.04, steps=0.8)
    log = jax.device_get(after["log"])
    assert set(log) == set(before["log"])
    # A step is logged in the very call that made it, and the micro-steps begin again.
    made = np.diff(log["step"], prepend=0)
    assert set(made) == {0, 1}
    np.testing.assert_array_equal(log["micro_step"] == 0, made == 1)
    assert log["step"][trainer.BASE // trainer.MICRO - 1] == 1
    assert examples_of(after["opt_state"]) + trainer.MICRO * log["micro_step"][-1] == examples


@pytest.mark.slow
def test_a_gpt_with_a_mask_tokens_and_an_average():
    """Sizes are tokens, and none of them is lost.

    Slow: two runs of a transformer.
    """
    examples = 4_800
    _, after = after_no_worse_than_before(gpt, examples, within=0.06, steps=0.9)
    state = after["opt_state"]
    assert int(state.gradient_step) == after["steps"]
    used = examples_of(state) + int(state.gathered_noise.num_examples)
    assert abs(used / gpt.tokens_in(examples) - 1.0) < 0.02


@pytest.mark.slow
def test_a_residual_network_with_batch_normalisation_and_one_broken_image(optimized):
    """The micro-batch of the broken image is left out, and so are the statistics that it made.

    Slow: two runs of a convolutional network, which take twice as long without optimizations.
    """
    _, after = after_no_worse_than_before(
        resnet, resnet.EXAMPLES, within=0.04, steps=0.95, broken=200
    )
    assert int(adabatch.metrics(after["opt_state"])["skipped_micro_batches"]) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after["batch_stats"]))
