"""The step in two programs, of which the rungs of the ladder share the second."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax.training import TrainConfig, build_optimizer, make_step, resolve
from adabatch_jax.training.data import Rung
from adabatch_jax.training.step import CompiledSteps, make_gradient, make_update

FEATURES, CLASSES = 256, 128
CONFIG = TrainConfig(optimizer="adam", initial_batch_size=16, max_batch_size=64, epochs=1)
OPTIMIZER = build_optimizer(resolve(CONFIG, 64))
DATA = (
    np.random.default_rng(0).normal(size=(64, FEATURES)).astype(np.float32),
    np.arange(64, dtype=np.int32) % CLASSES,
)


def apply(params, inputs):
    return inputs @ params["w"] + params["b"][None, :]


def first_state():
    params = {"w": jnp.zeros((FEATURES, CLASSES)), "b": jnp.zeros(CLASSES)}
    return params, OPTIMIZER.init(params)


def batch(rung):
    groups, size = rung.num_groups, rung.micro_batch_size
    indices = np.arange(groups * size, dtype=np.int32).reshape(groups, size)
    return indices, np.full(groups, size, np.int32), np.int32(groups)


@pytest.mark.slow
def test_the_rungs_share_one_update_and_end_where_the_whole_step_does():
    """Slow: every rung is compiled twice."""
    steps = CompiledSteps(lambda rung: make_gradient(apply), make_update(apply, OPTIMIZER))
    whole = jax.jit(make_step(apply, OPTIMIZER))
    ours, theirs = first_state(), first_state()
    for rung in (Rung(2, 8), Rung(4, 8), Rung(8, 8)):
        *ours, report = steps(rung, *ours, DATA, *batch(rung))
        *theirs, expected = whole(*theirs, DATA, *batch(rung))
        assert report.keys() == expected.keys()
        np.testing.assert_allclose(report["loss"], expected["loss"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), ours[0], theirs[0])
    assert steps.compilations == 4  # three gradients and the update
    steps.close()


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_two_programs_need_no_more_memory_than_one():
    """Slow: three programs with all optimizations."""
    rung = Rung(2, 8)
    state, gradient = first_state(), make_gradient(apply)
    arguments = (*state, DATA, *batch(rung))
    half = jax.eval_shape(gradient, *arguments)
    update = make_update(apply, OPTIMIZER)

    def compiled(function, donated, *given):
        return jax.jit(function, donate_argnums=donated).lower(*given).compile().memory_analysis()

    def peak(memory):
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return needed + memory.temp_size_in_bytes - memory.alias_size_in_bytes

    whole = peak(compiled(make_step(apply, OPTIMIZER), (0, 1), *arguments))
    first = compiled(gradient, (), *arguments)
    beside = sum(x.nbytes for x in jax.tree.leaves((state, DATA)))  # some of it is no argument
    assert beside + first.output_size_in_bytes + first.temp_size_in_bytes <= whole
    # The gradient is an argument of the second; in the whole step it is a temporary: the same sum.
    second = compiled(update, (0, 1), *state, DATA, *half)
    assert peak(second) <= 1.001 * whole
    assert second.alias_size_in_bytes >= optax.tree.size(state[0]) * 4 * 3
