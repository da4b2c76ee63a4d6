"""What every transformation promises, whatever it computes: one table, one test per promise."""

from __future__ import annotations

import contextlib
import functools
import re
import typing

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import adabatch_jax as adabatch
from tests.marks import slow


@contextlib.contextmanager
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@contextlib.contextmanager
def strict(promotion=strict_promotion):
    with promotion(), jax.transfer_guard("disallow"):
        yield


def modes(promotion=strict_promotion):
    # NaN are looked for on the host, so not where transfers are refused.
    nans = jax.debug_nans(True)
    return {"x64": jax.enable_x64(True), "strict": strict(promotion), "nans": nans}


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-7)


def params_of(dtype=jnp.float32):
    weights = jnp.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype)
    return {"b": jnp.asarray([0.5, -1.0], dtype), "w": weights}


def as_step(link, params):
    """`(state, gradient, extra arguments) → (state, updates)`: the order of `lax.scan`."""

    def step(state, gradient, extra_args):
        updates, state = link.update(gradient, state, params, **extra_args)
        return state, updates

    return step


def run(step, state, steps):
    """State and updates after each step."""
    history = []
    for given in steps:
        history.append(step(state, *given))
        state = history[-1][0]
    return history


class Placed(typing.NamedTuple):
    """A run as on a pod: state and gradients on a mesh, the old state handed over to each step."""

    history: list
    traces: int
    kept: bool  # nothing that was handed over was left
    shardings: set


@functools.cache
def placed_run(row):
    """The program that every other way to run the row is compared with; its own run keeps three promises.

    Compiling is what these tests spend their time on.
    """
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())
    params = jax.device_put(params_of(), everywhere)
    link, traces = row.make(), []

    def traced(*given):
        traces.append(1)
        return as_step(link, params)(*given)

    # keep_unused: a state that an update only overwrites would otherwise not be handed over at all.
    step = jax.jit(traced, donate_argnums=0, keep_unused=True)
    state, history, kept = jax.device_put(link.init(params), everywhere), [], False
    for given in jax.device_put(row.steps(params, count=12), everywhere):
        before, (state, updates) = state, step(state, *given)
        kept |= not all(x.is_deleted() for x in jax.tree.leaves(before))
        history.append(jax.tree.map(jnp.copy, (state, updates)))
    shardings = {x.sharding for x in jax.tree.leaves(state)}
    return Placed(history, len(traces), kept, shardings - {everywhere})


@pytest.fixture
def expected(row):
    """State and updates of four jitted steps."""
    return placed_run(row).history[:4]


def trace(row, **more):
    """The jaxpr of one update, in which nothing but its arguments should come from outside."""
    link, params = row.make(), params_of()
    gradient, extra_args = row.steps(params)[0]

    def update(state, gradient, params, extra_args):
        return link.update(gradient, state, params, **extra_args, **more)

    return jax.make_jaxpr(update)(link.init(params), gradient, params, extra_args)


@functools.cache
def plain_trace(row):
    return trace(row)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def form(tree):
    """What must not change from step to step, or jit compiles again."""
    kinds = {
        jax.tree_util.keystr(path): (x.shape, x.dtype.name, "weak" if x.weak_type else "strong")
        for path, x in jax.tree.leaves_with_path(tree)
    }
    return kinds, jax.tree.structure(tree)


def test_the_table_is_complete(table, public):
    def is_factory(thing):
        made = typing.get_type_hints(thing).get("return")
        return isinstance(made, type) and issubclass(made, optax.GradientTransformation)

    factories = {name for name, thing in public.items() if is_factory(thing)}
    of_factories = {"by_examples"}  # a factory that makes a factory
    assert factories | of_factories == {row.factory.__name__ for row in table}


def test_jit_changes_no_number(row, expected):
    link, params = row.make(), params_of()
    with jax.disable_jit():  # of the branches and loops inside, too
        plain = run(as_step(link, params), link.init(params), row.steps(params)[: row.by_hand])
    assert form(plain) == form(expected[: row.by_hand])
    assert_close(plain, expected[: row.by_hand])


def test_one_trace_serves_every_step(row):
    assert placed_run(row).traces == 1


def test_vmap_in_scan_equals_a_loop(row, expected):
    """Two runs side by side, of which the second begins in the middle of the first."""
    link, params = row.make(), params_of()
    step, steps = jax.vmap(as_step(link, params)), row.steps(params)
    states = stack([link.init(params), expected[1][0]])
    side_by_side = stack([stack(steps[0::2]), stack(steps[1::2])])
    state, updates = jax.lax.scan(lambda s, x: step(s, *x), states, side_by_side)
    assert_close(state, stack([expected[1][0], expected[3][0]]), rtol=row.rtol)
    in_turn = jax.tree.map(lambda u: jnp.swapaxes(u, 0, 1).reshape(4, *u.shape[2:]), updates)
    assert_close(in_turn, stack([u for _, u in expected]), rtol=row.rtol)


@pytest.mark.slow
def test_vmap_equals_a_loop(row, expected):
    """Slow: one program more for every row; by default `vmap` is inside of a scan."""
    link, params = row.make(), params_of()
    states = stack([link.init(params)] + [state for state, _ in expected[:-1]])
    together = jax.jit(jax.vmap(as_step(link, params)))(states, *stack(row.steps(params)))
    assert_close(together, stack(expected), rtol=row.rtol)


@pytest.mark.slow
def test_scan_equals_a_loop(row, expected):
    """Slow: one program more for every row; by default the scan is over a `vmap`."""
    link, params = row.make(), params_of()
    step, steps = as_step(link, params), stack(row.steps(params))
    state, updates = jax.lax.scan(lambda s, x: step(s, *x), link.init(params), steps)
    assert_close(state, expected[-1][0], rtol=row.rtol)
    assert_close(updates, stack([u for _, u in expected]), rtol=row.rtol)


@pytest.mark.slow
def test_in_a_chain(row, expected):
    """Slow: one program more for every row; `masked` and `inject_hyperparams` wrap it by default."""
    params = params_of()
    chain = optax.chain(optax.scale(0.25), optax.scale(4.0), row.make(), optax.scale(-2.0))
    got = run(jax.jit(as_step(chain, params)), chain.init(params), row.steps(params))
    assert_close([state[2] for state, _ in got], [state for state, _ in expected])
    assert_close([u for _, u in got], [jax.tree.map(lambda x: -2.0 * x, u) for _, u in expected])


def test_under_inject_hyperparams(row, expected):
    link, params = row.inject(), params_of()
    step = jax.jit(as_step(link, params))
    got = run(step, link.init(params), row.steps(params))
    assert step._cache_size() == 1
    assert_close([(state.inner_state, u) for state, u in got], expected)


def test_under_masked(row, expected):
    """Updates as if the other leaf did not exist; a noise that is passed still holds it."""
    params, more = params_of(), jnp.float32([3.0, 4.0])
    masked = optax.masked(row.make(), {"b": True, "w": True, "z": False})
    gradients = [gradient | {"z": more} for gradient, _ in row.steps(params)]
    steps = [(g, row.extra_args(g, i)) for i, g in enumerate(gradients)]
    params["z"] = more
    got = run(jax.jit(as_step(masked, params)), masked.init(params), steps)
    passed = [updates.pop("z") for _, updates in got]
    assert_close([updates for _, updates in got], [updates for _, updates in expected])
    chex.assert_trees_all_equal(passed, [more] * len(steps))


def test_unknown_extra_arguments_are_ignored(row):
    """The program is the same with and without them."""
    assert str(trace(row, unknown="text", other=None)) == str(plain_trace(row))


def test_dtypes_stay_and_statistics_are_float32(row):
    """Nothing is computed: an update says in its trace which dtypes it returns."""
    params = params_of(jnp.bfloat16)
    link = row.make()
    first = link.init(params)
    with row.promotion(strict_promotion):
        last, updates = jax.eval_shape(as_step(link, params), first, *row.steps(params)[0])
    assert form(updates) == form(params)
    assert form(last) == form(first)

    # Optax keeps its moments in the dtype of the parameters, and a snapshot is as what it copies.
    def foreign(node):
        return type(node).__module__.startswith("optax")

    ours = [
        x
        for path, x in jax.tree.leaves_with_path(last, is_leaf=foreign)
        if not foreign(x) and not re.search("snapshot_|previous_", jax.tree_util.keystr(path))
    ]
    assert {x.dtype.name for x in ours} <= {"float32", "int32", "uint32", "bool"}


@pytest.mark.parametrize("x64", [False, True])
def test_the_state_keeps_its_form(row, x64):
    """So that one trace serves every step: what an update is given and returns is alike."""
    link, params = row.make(), params_of()
    first, steps = link.init(params), row.steps(params)
    with jax.enable_x64(x64):
        last, updates = jax.eval_shape(as_step(link, params), first, *steps[0])
        assert form(first) == form(jax.eval_shape(link.init, params)) == form(last)
    assert form(updates) == form(params)


def test_a_replicated_state_stays_replicated(row):
    assert not placed_run(row).shardings


def test_the_state_can_be_donated(row):
    """Every other test compares its numbers with those of this run."""
    assert not placed_run(row).kept


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, 0.5], ids=["no parameters", "one number"])
def test_unusual_parameters(row, params):
    """Slow: one program more for every row."""
    params = jax.tree.map(jnp.float32, params)
    link = row.make()
    first = link.init(params)
    for state, updates in run(jax.jit(as_step(link, params)), first, row.steps(params)):
        assert form(state) == form(first)
        assert form(updates) == form(params)
        chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize("mode", ["strict", *slow("x64", "nans")])
def test_modes(row, expected, mode):
    link, params = row.make(), params_of()
    steps, of_numpy = row.steps(params), jax.device_get(params)
    with modes(lambda: row.promotion(strict_promotion))[mode]:
        got = run(jax.jit(as_step(link, of_numpy)), jax.jit(link.init)(params), steps)
    assert form(got) == form(expected)
    assert_close(got, expected, rtol=row.rtol)


def test_a_program_holds_no_array_of_the_device(row):
    """It would be fetched when the program is compiled."""
    programs = jax.make_jaxpr(row.make().init)(params_of()), plain_trace(row)
    held = [x for program in programs for x in program.consts if isinstance(x, jax.Array)]
    assert not held


@pytest.mark.parametrize("mode", ["strict", *slow("x64", "nans")])
def test_modes_of_value_and_grad_noise(mode):
    """With bfloat16 parameters, a traced count, and everything that can be asked for."""

    def loss_fn(params, x):
        return jnp.mean((x @ params["w"] + params["b"][:1, None]) ** 2)

    def measure():
        fn = adabatch.value_and_grad_noise(
            loss_fn, lanes=True, coordinate_wise=True, inner_products=True
        )
        return jax.jit(fn)(params, groups, count=count)

    params, count = params_of(jnp.bfloat16), jnp.int32(2)
    groups = jnp.arange(48, dtype=jnp.bfloat16).reshape(3, 2, 4, 2) / 48
    expected = measure()
    with modes()[mode]:
        got = measure()
    assert form(got) == form(expected)
    assert_close(got, expected, rtol=1e-2)
