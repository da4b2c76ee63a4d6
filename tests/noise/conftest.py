"""Shared by the tests of `noise`: a regression problem with its statistics in NumPy float64."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import GradientNoise, value_and_grad_noise


class Expected(NamedTuple):
    """What `value_and_grad_noise` should return, flattened to float64."""

    value: float
    mean: np.ndarray
    scatter: float
    coordinate_scatter: np.ndarray
    inner_product_scatter: float
    num_examples: int
    num_groups: int


class Regression:
    """Least squares; the gradient of one example is its residual times (1, features)."""

    def __init__(self) -> None:
        self.params = {"b": jnp.float32(0.25), "w": jnp.array([0.5, -1.0, 2.0], jnp.float32)}

    @staticmethod
    def loss(params: Any, group: Any) -> Any:
        """Mean over the real examples of a group."""
        residual = group["x"] @ params["w"] + params["b"] - group["y"]
        return 0.5 * jnp.sum(group["real"] * residual**2) / jnp.sum(group["real"])

    @classmethod
    def loss_and_aux(cls, params: Any, group: Any) -> Any:
        """With a float to be averaged, an integer and a bool to be summed, and what is of one group."""
        value = cls.loss(params, group)
        count = jnp.sum(group["real"]).astype(jnp.int32)
        return value, {
            "double": 2 * value,
            "seen": (count, count > 1),
            "one": cls.marks(group["y"][0]),
        }

    sum_aux: ClassVar[Any] = {"double": False, "seen": True, "one": False}

    @staticmethod
    def marks(y: Any) -> Any:
        """Integers, a bool and keys by which a group is known."""
        word = jax.lax.bitcast_convert_type(y, jnp.uint32)
        raw = jnp.stack([word, word + 1])
        key = jax.random.wrap_key_data(raw)
        return {
            "word": word,
            "byte": word.astype(jnp.uint8),
            "odd": word % 2 == 1,
            "raw": raw,
            "key": key,
        }

    @staticmethod
    def draw(seed: int, num_groups: int, group_size: int, sizes: Any = None) -> Any:
        """Groups of float32 examples; what lies beyond `sizes` is random too."""
        rng = np.random.default_rng(seed)
        sizes = np.full(num_groups, group_size) if sizes is None else np.asarray(sizes)
        return {
            "x": rng.normal(0.5, 1.0, (num_groups, group_size, 3)).astype(np.float32),
            "y": rng.normal(-1.0, 1.0, (num_groups, group_size)).astype(np.float32),
            "real": (np.arange(group_size)[None] < sizes[:, None]).astype(np.float32),
        }

    def expected(self, groups: Any) -> Expected:
        """The definitions, in float64, from the gradients of single examples."""
        x, y, real = (np.asarray(groups[k], np.float64) for k in ("x", "y", "real"))
        b, w = (np.asarray(self.params[k], np.float64) for k in ("b", "w"))
        used = real.sum(1) > 0
        x, y, real = x[used], y[used], real[used]
        sizes = real.sum(1)
        residual = x @ w + b - y
        gradients = residual[..., None] * np.concatenate([np.ones_like(x[..., :1]), x], -1)
        means = (real[..., None] * gradients).sum(1) / sizes[:, None]
        total = max(sizes.sum(), 1.0)
        mean = (sizes[:, None] * means).sum(0) / total
        square = mean @ mean
        return Expected(
            value=0.5 * (real * residual**2).sum() / total if used.any() else np.nan,
            mean=mean,
            scatter=(sizes * ((means - mean) ** 2).sum(1)).sum(),
            coordinate_scatter=(sizes[:, None] * (means - mean) ** 2).sum(0),
            inner_product_scatter=(sizes * (means @ mean - square) ** 2).sum(),
            num_examples=int(sizes.sum()),
            num_groups=int(used.sum()),
        )


class Form(NamedTuple):
    """One way of running over groups; `lanes` of them at once."""

    options: dict[str, Any]
    lanes: int = 0

    def shape(self, tree: Any) -> Any:
        """[num_groups, …] → [num_loops, num_lanes, …] where the form has lanes."""
        return jax.tree.map(
            lambda x: x.reshape((-1, self.lanes, *x.shape[1:])) if self.lanes else x, tree
        )


FORMS = {
    "one_by_one": Form({}),
    "vectorized": Form({"vectorize": 3}),
    "vectorized_with_remainder": Form({"vectorize": 4}),
    "lanes": Form({"lanes": True}, lanes=2),
}


@cache
def _compiled(form_name: str) -> Any:
    fn = value_and_grad_noise(
        Regression.loss_and_aux,
        has_aux=True,
        sum_aux=Regression.sum_aux,
        coordinate_wise=True,
        inner_products=True,
        **FORMS[form_name].options,
    )
    return jax.jit(fn)


@pytest.fixture(params=list(FORMS), scope="session")
def measure(request: pytest.FixtureRequest) -> Any:
    """`value_and_grad_noise` of the regression with everything on, in each form, compiled once."""
    form = FORMS[request.param]

    def run(groups: Any, sizes: Any = None, count: Any = None) -> Any:
        sizes = groups["real"].sum(1).astype(np.int32) if sizes is None else sizes
        arrays, sizes = form.shape(groups), form.shape(np.asarray(sizes))
        count = len(sizes) if count is None else count
        return _compiled(request.param)(Regression().params, arrays, count=count, sizes=sizes)

    run.lanes = max(form.lanes, 1)
    return run


@pytest.fixture(scope="session")
def regression() -> Regression:
    """The regression problem and its oracle."""
    return Regression()


@pytest.fixture(scope="session")
def flat() -> Any:
    """Pytree → one float64 vector."""
    return lambda tree: np.concatenate(
        [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    )


@pytest.fixture(scope="session")
def assert_same(flat: Any) -> Any:
    """Compares a `GradientNoise` with another or with the oracle, each part to its own size."""

    def check(noise: GradientNoise, expected: Any, rtol: float = 1e-5) -> None:
        assert int(noise.num_examples) == int(expected.num_examples)
        assert int(noise.num_groups) == int(expected.num_groups)
        for name in ("mean", "scatter", "coordinate_scatter", "inner_product_scatter"):
            ours, theirs = getattr(noise, name), getattr(expected, name)
            if ours is not None and theirs is not None:
                ours, theirs = flat(ours), flat(theirs)
                size = np.max(np.abs(theirs), initial=1e-6)
                np.testing.assert_allclose(ours, theirs, rtol, 0.1 * rtol * size, err_msg=name)

    return check
