"""The runs behind `batch_curvature.py`: spectra of the full matrix and of batches, and their noise."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import cross_entropy, data
from jax.flatten_util import ravel_pytree

import adabatch_jax as adabatch
from adabatch_jax.curvature import lanczos, random_unit
from adabatch_jax.training import Feed
from adabatch_jax.training.models import CNN, MLP

N = 8192
GROUP = 16
TOP, BOTTOM = 10, 4  # Ritz vectors of the full matrix that the diagnostics know
SINGLE = 512  # examples whose products are kept one by one
JUDGED, FITTED = (16, 64, 256, 1024, 4096), (32, 128, 512)
SAMPLES = {16: 16, 32: 16, 64: 16, 128: 8, 256: 8, 512: 6, 1024: 5, 4096: 5}
STEPS = {"mlp": 40, "cnn": 20}
KEYS = range(5)
NETS, STATES, MATRICES = ("mlp", "cnn"), ("init", "trained"), ("hessian", "gauss-newton")
Result = dict[str, Any]


@functools.cache
def network(net: str) -> tuple[Any, Any, Any]:
    """The model as a function, its loss, and initial parameters."""
    model = MLP(10) if net == "mlp" else CNN(10, channels=(8, 16), width=64)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(model.apply(params, x), y)

    return model.apply, loss_fn, model.init(jax.random.key(0), jnp.zeros((1, 28, 28)))


@functools.cache
def examples() -> tuple[jax.Array, jax.Array]:
    x, y = data("fashion-mnist")["train"]
    chosen = np.random.default_rng(0).permutation(len(y))[:N]
    return x[chosen], y[chosen]


def product(net: str, matrix: str, params: Any, x: jax.Array, y: jax.Array, count: Any) -> Any:
    apply, loss_fn, _ = network(net)
    if matrix == "hessian":
        return adabatch.curvature.hessian_vector_product(loss_fn, params, x, y, count=count)
    return adabatch.curvature.gauss_newton_vector_product(
        apply, cross_entropy, params, x, y, count=count
    )


def train(net: str, out: Path) -> Result:
    """Three epochs of Adam at 256 under cosine decay; both states of the parameters are kept."""
    apply, loss_fn, first = network(net)
    found = data("fashion-mnist")
    x, y = found["train"]
    per_epoch = len(y) // 256
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, 3 * per_epoch))

    @jax.jit
    def epoch(params: Any, state: Any, x: jax.Array, y: jax.Array, order: jax.Array) -> Any:
        def step(carry: Any, index: jax.Array) -> Any:
            params, state = carry
            updates, state = optimizer.update(
                jax.grad(loss_fn)(params, x[index], y[index]), state, params
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    params, state, feed = first, optimizer.init(first), Feed(len(y), 0)
    for number in range(3):
        order = feed.indices(number * len(y), per_epoch * 256).reshape(per_epoch, 256)
        params, state = epoch(params, state, x, y, jnp.asarray(order))
    x, y = found["test"]
    accuracy = float(jnp.mean(jnp.argmax(apply(params, x), axis=-1) == y))
    flat = {"init": ravel_pytree(first)[0], "trained": ravel_pytree(params)[0]}
    np.savez(out / f"{net}.npz", **flat)
    return {"accuracy": accuracy, "parameters": flat["init"].size}


def parameters(net: str, state: str, out: Path) -> Any:
    flat, unravel = ravel_pytree(network(net)[2])
    return unravel(jnp.asarray(np.load(out / f"{net}.npz")[state], flat.dtype))


def full(net: str, state: str, matrix: str, out: Path) -> Result:
    """Ends of the full matrix with their vectors U, and of every group Uᵀ H U and (H U)ᵀ H U."""
    params, (x, y) = parameters(net, state, out), examples()
    flat, unravel = ravel_pytree(params)
    micro = (x.reshape(-1, 256, 28, 28), y.reshape(-1, 256))
    operator = product(net, matrix, params, *micro, N // 256)
    values, vectors, residuals = ritz_pairs(operator, flat, unravel, STEPS[net])
    chosen = [*range(-1, -TOP - 1, -1), *range(BOTTOM)]

    @functools.partial(jax.jit, static_argnames="whole")
    def images(params: Any, x: jax.Array, y: jax.Array, u: jax.Array, whole: bool) -> Any:
        def one(group: Any) -> Any:
            linear = product(net, matrix, params, *group, None).linear()
            image = jax.vmap(lambda v: ravel_pytree(linear(unravel(v)))[0])(u)
            return image if whole else (image @ u.T, image @ image.T)

        return jax.lax.map(one, (x, y))

    u = jnp.asarray(vectors[chosen])
    inside, square = images(
        params, x.reshape(-1, GROUP, 28, 28), y.reshape(-1, GROUP), u, whole=False
    )
    one_by_one = images(params, x[:SINGLE, None], y[:SINGLE, None], u[:1], whole=True)
    away = np.asarray(one_by_one)[:, 0] - values[-1] * vectors[-1]
    np.savez(
        out / f"{net}-{state}-{matrix}.npz", values=values[chosen], vectors=np.asarray(u),
        inside=np.asarray(inside), square=np.asarray(square), gram=away @ away.T,
    )  # fmt: skip
    ends = {"largest": float(values[-1]), "smallest": float(values[0])}
    return ends | {"residuals": [float(r) for r in residuals[chosen]]}


def ritz_pairs(operator: Any, flat: jax.Array, unravel: Any, steps: int) -> Any:
    """All Ritz values, vectors and residuals: the library's Lanczos returns only the top vector."""
    basis, tridiagonal = np.zeros((steps, flat.size), np.float32), np.zeros((steps + 1, steps + 1))
    vector = np.random.default_rng(1).normal(size=flat.size)
    for i in range(steps):
        basis[i] = vector / np.linalg.norm(vector)
        vector = np.array(ravel_pytree(operator(unravel(jnp.asarray(basis[i]))))[0])
        tridiagonal[i, i] = basis[i] @ vector
        for _ in range(2):
            vector -= (basis[: i + 1] @ vector) @ basis[: i + 1]
        tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = np.linalg.norm(vector)
    values, coefficients = np.linalg.eigh(tridiagonal[:steps, :steps])
    residuals = np.abs(tridiagonal[steps, steps - 1] * coefficients[-1])
    return values, (coefficients.T @ basis).astype(np.float32), residuals


def noise(net: str, state: str, out: Path) -> Result:
    """ν² by the library's two probes."""
    params, (x, y) = parameters(net, state, out), examples()
    groups = (x.reshape(-1, GROUP, 28, 28), y.reshape(-1, GROUP))
    loss_fn = lambda p, group: network(net)[1](p, *group)
    probe = jax.jit(
        lambda params, key, groups, name: adabatch.curvature.hessian_noise(
            loss_fn, params, groups, key, probe=name
        ),
        static_argnums=3,
    )
    random = [float(probe(params, jax.random.key(k), groups, "random")) for k in KEYS]
    return {"ritz": float(probe(params, jax.random.key(0), groups, "ritz")), "random": random}


def subsamples(size: int) -> list[np.ndarray]:
    rng = np.random.default_rng(size)
    return [rng.choice(N, size, replace=False) for _ in range(SAMPLES[size])]


def along(net: str, state: str, matrix: str, out: Path) -> Result:
    """u₁ᵀ H_i u₁ of every example: its mean over a batch is a control variate for λ₁′."""
    (apply, _, _), params = network(net), parameters(net, state, out)
    unravel = ravel_pytree(params)[1]
    u = unravel(jnp.load(out / f"{net}-{state}-{matrix}.npz")["vectors"][0])

    @jax.jit
    def second(params: Any, u: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits, slope = jax.jvp(lambda p: apply(p, x), (params,), (u,))
        if matrix == "gauss-newton":
            chance = jax.nn.softmax(logits)
            return (chance * slope**2).sum(-1) - (chance * slope).sum(-1) ** 2

        def losses(step: jax.Array) -> jax.Array:
            moved = jax.tree.map(lambda p, v: p + step * v, params, u)
            return optax.losses.softmax_cross_entropy_with_integer_labels(apply(moved, x), y)

        return jax.jvp(lambda t: jax.jvp(losses, (t,), (1.0,))[1], (0.0,), (1.0,))[1]

    parts = [jnp.reshape(a, (-1, 512, *a.shape[1:])) for a in examples()]
    values = np.concatenate([second(params, u, x, y) for x, y in zip(*parts, strict=True)])
    return {"along": values.astype(float).round(5).tolist()}


@functools.partial(jax.jit, static_argnames="steps")
def ends(operator: Any, params: Any, key: jax.Array, directions: jax.Array, steps: int) -> Any:
    spectrum, top = lanczos(operator.linear(), random_unit(key, params), steps)
    high, low = jnp.argmax(spectrum.eigenvalues), jnp.argmin(spectrum.eigenvalues)
    overlaps = jnp.square(directions @ ravel_pytree(top)[0])
    at = lambda i: (spectrum.eigenvalues[i], spectrum.residuals[i])
    return (*at(high), *at(low), overlaps)


def batches(net: str, state: str, matrix: str, size: int, out: Path) -> Result:
    """Extremes of batches of one size, and how far their top eigenvectors are the full ones."""
    params, (x, y) = parameters(net, state, out), examples()
    directions = jnp.asarray(np.load(out / f"{net}-{state}-{matrix}.npz")["vectors"][:TOP])
    # Two sizes of micro-batches, hence two compilations: the rest is a matter of the count.
    micro, allocated = (16, 4) if size <= 64 else (128, 32)
    draws = subsamples(size)

    def one(number: int) -> Any:
        index = np.resize(draws[number], micro * allocated).reshape(allocated, micro)
        operator = product(net, matrix, params, x[index], y[index], jnp.int32(size // micro))
        return jax.device_get(
            ends(operator, params, jax.random.key(number), directions, STEPS[net])
        )

    results = [one(0)]  # compiles before two threads share the cores
    with ThreadPoolExecutor(2) as pool:
        results += pool.map(one, range(1, len(draws)))
    names = ("largest", "largest_residual", "smallest", "smallest_residual")
    found: Result = {name: [float(r[i]) for r in results] for i, name in enumerate(names)}
    overlaps = np.array([r[4] for r in results])
    return found | {"overlap": overlaps[:, 0].tolist(), "inside": overlaps.sum(1).tolist()}


def key(net: str, state: str, matrix: str, size: int) -> str:
    return f"{net} batches of {size} | {state} | {matrix}"
