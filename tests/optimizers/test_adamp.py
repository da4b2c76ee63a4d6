"""AdamP against its definition, written once more in NumPy, and closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adabatch_jax import adamp
from adabatch_jax.optimizers import scale_by_adamp

OPTIONS = dict(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.05, delta=0.1, wd_ratio=0.1)


def cosine(a, b):
    return np.abs(a @ b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30)


def reference(w, gradients, rate, *, nesterov, axis, b1, b2, eps, weight_decay, delta, wd_ratio):
    """Algorithm 2 of the paper with the authors' two views, for one weight, in float64."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    history, projected = [], []
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        ahead = b1 * m + (1 - b1) * g if nesterov else m
        step = (ahead / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        ratio, how = 1.0, 0
        if w.ndim > 1:
            moved = np.moveaxis(w, axis, 0)
            for view, shape in ((1, (moved.shape[0], -1)), (2, (1, -1))):
                rows = [np.moveaxis(x, axis, 0).reshape(shape) for x in (w, g, step)]
                size = rows[0].shape[1]
                if max(cosine(a, b) for a, b in zip(*rows[:2], strict=True)) < delta / size**0.5:
                    unit = rows[0] / np.linalg.norm(rows[0], axis=1, keepdims=True)
                    flat = rows[2] - unit * np.sum(unit * rows[2], axis=1, keepdims=True)
                    step = np.moveaxis(flat.reshape(moved.shape), 0, axis)
                    ratio, how = wd_ratio, view
                    break
        projected.append(how)
        w = w - rate * (step + weight_decay * ratio * w)
        history.append(w)
    return history, projected


def tangential(rng, w, axis=None):
    """A gradient orthogonal to `w`: row by row of the channel axis, or as a whole."""
    g = rng.normal(size=w.shape)
    if axis is None:
        return g - w * (g * w).sum() / (w * w).sum()
    others = tuple(i for i in range(w.ndim) if i != axis % w.ndim)
    along = (g * w).sum(axis=others, keepdims=True) / (w * w).sum(axis=others, keepdims=True)
    return g - w * along


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis", "kind", "view"),
    [
        ((6, 4), -1, "rows", 1),
        ((6, 4), 0, "rows", 1),
        ((3, 3, 2, 5), -1, "rows", 1),
        ((6, 4), -1, "whole", 2),
        ((6, 4), -1, "any", 0),
        ((7,), -1, "any", 0),
    ],
)
def test_it_is_the_paper_s_algorithm(shape, axis, kind, view, nesterov):
    rng = np.random.default_rng(1)
    w, rate = rng.normal(size=shape), 0.05
    if kind == "any":
        gradients = [rng.normal(size=shape) + w for _ in range(6)]
    else:  # the weight moves hardly, so that the gradients stay tangential
        rate = 1e-5
        gradients = [tangential(rng, w, axis if kind == "rows" else None) for _ in range(6)]
    expected, projected = reference(w, gradients, rate, nesterov=nesterov, axis=axis, **OPTIONS)
    assert set(projected) == {view}
    optimizer = adamp(rate, nesterov=nesterov, channel_axis=axis, **OPTIONS)
    params, state = jnp.float32(w), optimizer.init(jnp.float32(w))
    for g, wanted in zip(gradients, expected, strict=True):
        updates, state = jax.jit(optimizer.update)(jnp.float32(g), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, wanted, rtol=1e-5, atol=1e-6)


def test_without_a_threshold_it_is_adamw():
    rng = np.random.default_rng(2)
    params = {"w": jnp.float32(rng.normal(size=(4, 3))), "b": jnp.float32(rng.normal(size=3))}
    ours = adamp(0.1, weight_decay=0.01, delta=0.0)
    theirs = optax.adamw(0.1, weight_decay=0.01)
    states = [ours.init(params), theirs.init(params)]
    for _ in range(5):
        g = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
        (a, states[0]), (b, states[1]) = (
            o.update(g, s, params) for o, s in zip((ours, theirs), states, strict=True)
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7), a, b)


def test_the_length_of_a_scale_invariant_weight_grows_as_pythagoras_says():
    """Loss f(w/‖w‖): every step is orthogonal to w, so ‖w‖² grows by the step's squared length."""

    def loss(w):
        return jnp.sum(jnp.square(w / jnp.linalg.norm(w) - jnp.full(w.shape, 0.4)))

    w = jnp.float32(np.random.default_rng(0).normal(size=(8, 1)))
    optimizer = adamp(0.01)
    state = optimizer.init(w)
    for _ in range(30):
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        new = optax.apply_updates(w, updates)
        grown = jnp.sum(new**2) - jnp.sum(w**2)
        np.testing.assert_allclose(grown, jnp.sum(updates**2), rtol=1e-2, atol=2e-6)
        w = new


def test_zero_weights_and_zero_gradients_give_finite_steps():
    optimizer = adamp(0.1, weight_decay=0.1)
    for w in (jnp.zeros((3, 2)), jnp.zeros((0, 2)), jnp.ones((2, 2))):
        updates, _ = optimizer.update(jnp.zeros_like(w), optimizer.init(w), w)
        assert np.isfinite(updates).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "b1 must lie in .*, got 1.0"),
        ({"b2": -0.1}, "b2 must lie in .*, got -0.1"),
        ({"eps": -1.0}, "eps must lie in .*, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must lie in .*, got -0.1"),
        ({"delta": -0.1}, "delta must lie in .*, got -0.1"),
        ({"wd_ratio": 1.5}, "wd_ratio must lie in .*, got 1.5"),
        ({"channel_axis": 0.5}, "channel_axis must be an integer, got 0.5"),
    ],
)
def test_bad_arguments_are_named(options, message):
    for factory in (scale_by_adamp, lambda **o: adamp(0.1, **o)):
        with pytest.raises(ValueError, match=message):
            factory(**options)


def test_without_parameters_it_says_what_it_needs():
    link = scale_by_adamp()
    with pytest.raises(ValueError, match=r"projects along the parameters.*state, params\)"):
        link.update(jnp.ones(2), link.init(jnp.ones(2)))
