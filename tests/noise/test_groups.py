"""`split_groups`: rows stay in order, and what cannot be split is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import split_groups


def test_rows_keep_their_order():
    batch = {"x": np.arange(24).reshape(12, 2), "y": np.arange(12)}
    groups = split_groups(batch, 3)
    assert groups["x"].shape == (3, 4, 2)
    assert groups["y"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert np.array_equal(groups["x"].reshape(12, 2), batch["x"])


@pytest.mark.parametrize(("num_groups", "shape"), [(1, (1, 6)), (6, (6, 1))])
def test_one_group_and_groups_of_one(num_groups, shape):
    assert split_groups(jnp.arange(6), num_groups).shape == shape


def test_random_keys_are_split_like_rows():
    keys = jax.random.split(jax.random.key(0), 6)
    groups = split_groups(keys, 3)
    assert groups.shape == (3, 2)
    assert jnp.array_equal(jax.random.key_data(groups[1, 0]), jax.random.key_data(keys[2]))


@pytest.mark.parametrize(
    ("batch", "num_groups", "message"),
    [
        (np.ones(6), 0, "num_groups must be a positive integer, got 0"),
        (np.ones(6), -2, "num_groups must be a positive integer, got -2"),
        (np.ones(6), 4, "num_groups=4 does not divide batch size 6"),
        ((np.ones(6), np.ones(4)), 2, r"batch needs the same leading axis.*6.*4"),
        ((np.ones(6), np.float32(1)), 2, "batch needs the same leading axis"),
    ],
)
def test_what_cannot_be_split_is_named(batch, num_groups, message):
    with pytest.raises(ValueError, match=f"split_groups.*{message}"):
        split_groups(batch, num_groups)
