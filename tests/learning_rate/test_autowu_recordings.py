"""The decisions of the authors' own code, replayed through ours.

Each recording is one run of kakaobrain/autowu (PyTorch, GPyTorch) on a given series of losses, with
the learning rate of every step; `tests` are [losses so far, probability, location of the minimum].
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import scale_by_autowu
from adabatch_jax.learning_rate import rbf_smoother
from tests.marks import slow

RECORDINGS = {path.stem: path for path in Path(__file__).parent.glob("recordings/*.json")}
DETERMINISTIC = [n for n, p in RECORDINGS.items() if json.loads(p.read_text())["deterministic"]]
RANDOM = sorted(set(RECORDINGS) - set(DETERMINISTIC))
SHORT = ("bowl_small_noise", "bowl_linear_warmup", "monotone_never_switches", RANDOM[0])


def some(names):
    """All recordings; those not in `SHORT` are slow, for each compiles a Gaussian process of its own."""
    return [pytest.param(n, marks=[] if n in SHORT else pytest.mark.slow) for n in names]


NAMES = {"cooldown_type": "decay", "warmup_type": "warmup", "warmup_unit": "warmup_unit"}


def load(name):
    return json.loads(RECORDINGS[name].read_text())


def total_steps(recording):
    return recording["steps_per_epoch"] * recording["total_epochs"]


def losses_of(recording):
    known = [np.nan if loss is None else loss for loss in recording["losses"]]
    return np.pad(np.float32(known), (0, total_steps(recording) - len(known)), constant_values=1.0)


def replay(recording, losses, **more):
    """The states after every step, stacked."""
    options = dict(recording["options"])
    if not options.pop("immediate_cooldown"):
        options["cooldown_fraction"] = options.get("cooldown_fraction", 0.2)
    options = {NAMES.get(name, name): value for name, value in options.items()} | more
    link = scale_by_autowu(
        total_steps=total_steps(recording), steps_per_test=recording["steps_per_epoch"], **options
    )

    def step(state, loss):
        _, state = link.update({}, state, value=loss)
        shown = state._replace(loss_history=(), warmup_memory=(), loss_level=())
        return state, shown

    return jax.jit(lambda s, x: jax.lax.scan(step, s, x)[1])(link.init({}), jnp.asarray(losses))


def test_there_are_recordings_of_both_kinds():
    assert len(DETERMINISTIC) == 8 and len(RANDOM) == 3


@pytest.mark.parametrize("name", some(DETERMINISTIC))
def test_without_random_draws_every_number_is_theirs(name):
    recording = load(name)
    states = replay(recording, losses_of(recording))
    rates, theirs = np.asarray(states.autowu_learning_rate), np.asarray(recording["learning_rates"])
    highest = theirs[recording["first_step_after_warmup"] :].max()
    np.testing.assert_array_less(np.abs(rates - theirs), 1e-4 * np.maximum(theirs, 0.01 * highest))
    for count, probability, location in recording["tests"]:
        assert (
            abs(float(states.last_warmup_test.minimum_probability[count - 1]) - probability) < 2e-3
        )
        assert (
            abs(float(states.last_warmup_test.minimum_location[count - 1]) - location) < 1.5 / 499
        )
    assert int(states.last_warmup_test.tests_made[-1]) == len(recording["tests"])


@pytest.mark.parametrize("seed", [0, *slow(1)])
@pytest.mark.parametrize("name", some(RANDOM))
def test_with_random_draws_the_decision_is_one_of_theirs(name, seed):
    recording = load(name)
    states = replay(recording, losses_of(recording), smoother=rbf_smoother(seed=seed))
    end = int(states.peak_position[-1])
    rate = float(states.autowu_learning_rate[end])
    theirs = [(recording["first_step_after_warmup"], recording["learning_rate_after_warmup"])]
    theirs += recording["other_seeds"]
    interval = recording["steps_per_epoch"]
    assert any(abs(end - t) <= interval and 0.8 < rate / lr < 1.25 for t, lr in theirs)


@pytest.mark.slow
def test_a_rate_depends_on_the_losses_before_it_alone():
    """Slow: several replays with a Gaussian process."""
    recording = load("bowl_small_noise_early")
    losses = losses_of(recording)
    rates = np.asarray(replay(recording, losses).autowu_learning_rate)
    for t in (20, 40, 55):
        other = losses.copy()
        other[t:] = np.linspace(9.0, -3.0, len(losses) - t)
        changed = np.asarray(replay(recording, other).autowu_learning_rate)
        np.testing.assert_array_equal(changed[: t + 1], rates[: t + 1])
        assert (changed != rates).any()
