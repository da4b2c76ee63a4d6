"""Auxiliary data over groups: means, sums, and what advances as in one step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import split_groups, value_and_grad_noise
from adabatch_jax.noise import value_and_grad_signs
from adabatch_jax.noise._structured._estimate import value_and_grad_structured

BATCH = jnp.arange(1.0, 9.0)


def test_floats_are_weighted_means_and_what_is_marked_sums(regression, measure):
    sizes = [3, 1, 0, 2, 1, 3]
    groups = regression.draw(4, num_groups=6, group_size=3, sizes=sizes)
    (value, aux), _ = measure(groups)
    np.testing.assert_allclose(aux["double"], 2 * value, rtol=1e-6)
    assert int(aux["seen"][0]) == 10
    assert int(aux["seen"][1]) == 3  # groups of more than one example
    assert aux["seen"][1].dtype == jnp.int32


@pytest.mark.parametrize("empty", [(), (0,), (0, 1, 2)])
def test_the_rest_is_that_of_the_first_group_with_examples(regression, measure, empty):
    sizes = np.array([3, 300, 1, 256, 2, 1])  # 256 is 0 in a byte
    sizes[list(empty)] = 0
    groups = regression.draw(5, num_groups=6, group_size=3, sizes=np.minimum(sizes, 3))
    (_, aux), _ = measure(groups, sizes=sizes)
    lane = [j for j in range(6) if sizes[j] and j % measure.lanes == 0]  # the first lane has some
    expected = regression.marks(jnp.asarray(groups["y"])[lane[0], 0])
    assert aux["one"]["key"].dtype == expected["key"].dtype
    for name in ("word", "byte", "odd", "raw"):
        assert aux["one"][name].dtype == expected[name].dtype
        np.testing.assert_array_equal(aux["one"][name], expected[name], err_msg=name)
    np.testing.assert_array_equal(
        jax.random.key_data(aux["one"]["key"]), jax.random.key_data(expected["key"])
    )


def loss_and_state(w, x, state):
    """A loss, and a state that goes from step to step: counter, flag, keys and a running mean."""
    mean = 0.9 * state["mean"] + 0.1 * jnp.mean(x)
    key = jax.random.fold_in(state["key"], 1)
    raw = jax.random.key_data(key)
    new = {"count": state["count"] + 1, "ready": state["count"] > 0, "key": key, "raw": raw}
    return jnp.mean((w - x) ** 2), {**new, "mean": mean}


def losses_and_state(w, x, state):
    return (w - x) ** 2, loss_and_state(w, x, state)[1]


FORMS = {
    "plain": lambda s: value_and_grad_noise(loss_and_state, has_aux=True, sum_aux=s),
    "lanes": lambda s: value_and_grad_noise(loss_and_state, has_aux=True, sum_aux=s, lanes=True),
    "signs": lambda s: value_and_grad_signs(losses_and_state, has_aux=True, sum_aux=s),
    "structured": lambda s: value_and_grad_structured(loss_and_state, has_aux=True, sum_aux=s),
}


def run(form, state, sum_aux=False):
    groups = split_groups(BATCH, 8 if form == "structured" else 4)
    if form == "lanes":
        groups = groups.reshape(2, 2, 2)
    key = [jax.random.key(9)] if form == "signs" else []
    return jax.jit(FORMS[form](sum_aux))(jnp.float32(0), groups, *key, state)[0][1]


# Nothing random is drawn from the keys of this state, so it does no harm that groups share them.
@pytest.mark.filterwarnings("ignore:.* is a PRNG key, the same in every group:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_a_state_advances_as_in_one_step(form):
    key = jax.random.key(3)
    old = {"count": jnp.uint32(5), "ready": jnp.bool_(False), "key": key}
    old |= {"raw": jax.random.key_data(key), "mean": jnp.float32(1)}
    ((_, once), _), new = (
        jax.value_and_grad(loss_and_state, has_aux=True)(jnp.float32(0), BATCH, old),
        run(form, old),
    )
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, once)
    assert (int(new["count"]), bool(new["ready"])) == (6, True)
    np.testing.assert_array_equal(new["raw"], once["raw"])
    np.testing.assert_array_equal(jax.random.key_data(new["key"]), once["raw"])
    np.testing.assert_allclose(new["mean"], once["mean"], rtol=1e-6)
    # Added up where asked for, a prefix being enough; keys never are.
    summed = run(form, old, sum_aux=True)
    groups = 8 if form == "structured" else 4
    assert int(summed["count"]) == 6 * groups
    assert int(summed["ready"]) == groups
    np.testing.assert_array_equal(summed["raw"], once["raw"])
    np.testing.assert_array_equal(jax.random.key_data(summed["key"]), once["raw"])
    np.testing.assert_allclose(summed["mean"], groups * once["mean"], rtol=1e-6)


def test_aux_keeps_its_structure_and_its_dtypes():
    def loss(w, x):
        aux = {"half": jnp.mean(x).astype(jnp.bfloat16), "no": None, "one": (1,), "z": 1j * x[0]}
        return jnp.mean(w * x), aux

    fn = value_and_grad_noise(loss, has_aux=True)
    (_, aux), _ = jax.jit(fn)(jnp.float32(1.0), jnp.stack([jnp.ones(2), 3 * jnp.ones(2)]))
    assert aux["half"].dtype == jnp.bfloat16
    assert float(aux["half"]) == 2.0
    assert aux["no"] is None
    assert int(aux["one"][0]) == 1
    assert (aux["z"].dtype, complex(aux["z"])) == (jnp.complex64, 2j)


def test_a_sum_of_small_integers_has_room():
    fn = value_and_grad_noise(lambda w, x: (w * x[0], jnp.uint8(200)), has_aux=True, sum_aux=True)
    (_, aux), _ = jax.jit(fn)(jnp.float32(1.0), jnp.ones((4, 2)))
    assert int(aux) == 800


@pytest.mark.parametrize("factory", [value_and_grad_noise, value_and_grad_signs])
def test_marks_that_are_no_bools_are_named(factory):
    with pytest.raises(ValueError, match=r"sum_aux must hold bools.*got 1"):
        factory(loss_and_state, has_aux=True, sum_aux={"count": 1})


def test_marks_of_another_structure_are_named():
    fn = value_and_grad_noise(lambda w, x: (w * x[0], {"a": 1}), has_aux=True, sum_aux={"b": True})
    with pytest.raises(ValueError, match="sum_aux must be a bool or a pytree of bools like aux"):
        fn(jnp.float32(1.0), jnp.ones((4, 2)))
