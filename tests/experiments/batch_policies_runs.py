"""One run of `batch_policies.py`: a policy for the batch size, a learning rate, a budget of examples.

The whole run is one compiled loop over data on the device. A batch is split into at least 16 groups
whose size doubles as the batch does, so that small batches have enough degrees of freedom and large ones
stay cheap; every size of group is compiled once. Policies that look at no noise take fewer groups, and
those of `CHOICES` more or fewer, to see what it changes.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data

import adabatch_jax as adabatch
from adabatch_jax.training.models import build_model

FIRST, LARGEST = 64, 4096
VALIDATION = 10_000  # the last of the training images: they choose the learning rate
RECIPES = {"adagrad": adabatch.adadagrad, "adagrad-norm": adabatch.adadagrad_norm}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, by which optimizer, for how many epochs of examples."""

    dataset: str
    model: str
    optimizer: str
    epochs: int

    def __str__(self) -> str:
        return f"{self.dataset} {self.model} {self.optimizer} {self.epochs} epochs"


@dataclasses.dataclass(frozen=True)
class Policy:
    """Options of the recipe, as a function of the learning rate and of the examples of an epoch."""

    options: Callable[[Any, int], dict[str, Any]]
    measure: dict[str, bool] | None = None  # options of value_and_grad_noise; None: no noise
    smallest: int = FIRST
    constant: bool = False
    groups: int = 16  # at least, of a batch; 0: single examples
    signs: bool = False  # instead of the noise between groups, that of one sign vector in each

    def build(self, rate: Any, per_epoch: int) -> dict[str, Any]:
        bounds = {"initial_batch_size": FIRST, "max_batch_size": LARGEST}
        return bounds | {"min_batch_size": self.smallest} | self.options(rate, per_epoch)


def constant(size: int) -> Policy:
    bounds = dict.fromkeys(("initial_batch_size", "max_batch_size", "min_batch_size"), size)
    return Policy(lambda rate, n: bounds | {"criterion": lambda noise: 0.0}, None, size, True)


def criterion(made: Any, measure: dict[str, bool] | None = None, **options: Any) -> Policy:
    return Policy(lambda rate, n: {"criterion": made} | options, measure or {})


CONSTANT = (64, 256, 1024, 4096)
AVERAGED = {"monotone": False, "ema_decay": 0.95}
POLICIES: dict[str, Policy] = {
    **{f"constant {size}": constant(size) for size in CONSTANT},
    "norm 1": criterion(adabatch.norm_test(1.0)),
    "norm 0.5": criterion(adabatch.norm_test(0.5)),
    "norm 1, rate × √b": criterion(adabatch.norm_test(1.0), scaling=adabatch.sqrt_scaling()),
    "coordinates 3": criterion(adabatch.coordinate_norm_test(3.0), {"coordinate_wise": True}),
    "inner product 0.5": criterion(adabatch.inner_product_test(0.5), {"inner_products": True}),
    "augmented 0.5, 1": criterion(
        adabatch.augmented_inner_product_test(0.5, 1.0), {"inner_products": True}
    ),
    "noise scale": Policy(
        lambda rate, n: {"criterion": adabatch.gradient_noise_scale()} | AVERAGED, {}, 16
    ),
    # Its α is a step of SGD; behind AdaGrad α/√v is about 1 here, and with α itself b stays at 16.
    "CABS 1": Policy(lambda rate, n: {"criterion": adabatch.cabs(1.0)} | AVERAGED, {}, 16),
    "ramp × 4 an epoch": Policy(
        lambda rate, n: {
            "criterion": adabatch.batch_size_schedule(
                optax.piecewise_constant_schedule(FIRST, {n: 4, 2 * n: 4})
            )
        }
    ),
}


def norm_test(eta: float, groups: int = 16, signs: bool = False, **options: Any) -> Policy:
    made = criterion(adabatch.norm_test(eta), **options)
    return dataclasses.replace(made, groups=groups, signs=signs)


SQRT = {"scaling": adabatch.sqrt_scaling()}
CHOICES: dict[str, Policy] = {
    **{f"η = {eta:g}": norm_test(eta) for eta in (0.25, 0.5, 1.0, 2.0, 4.0)},
    **{f"η = {eta:g}, rate × √b": norm_test(eta, **SQRT) for eta in (0.25, 0.5, 1.0, 2.0, 4.0)},
    "η = 1, rate × b": norm_test(1.0, scaling=adabatch.linear_scaling()),
    "η = 1, rate × √b, single examples": norm_test(1.0, 0, **SQRT),
    **{f"η = 1, rate × √b, {n} groups": norm_test(1.0, n, **SQRT) for n in (64, 4, 2)},
    "η = 1, rate × √b, 1 sign vector": norm_test(1.0, 1, True, **SQRT),
    "η = 1, rate × √b, 4 groups, smoothed": norm_test(1.0, 4, **SQRT, ema_decay=0.9, debias=True),
}


def run(task: Task, policy: str, rate: float, seed: int, folder: str | None) -> dict[str, Any]:
    """Trains once; validation and test accuracy, losses, and what the batch did."""
    made = compiled(task, policy, folder)
    given = arguments(task, rate, seed, folder)
    start = time.perf_counter()
    params, used, steps, largest = jax.block_until_ready(made(*given))
    seconds = time.perf_counter() - start
    apply, parts = build_model(task.model, 10).apply, split(task.dataset, folder)
    train_loss, _ = evaluate(apply, params, *parts["train"])
    _, validation = evaluate(apply, params, *parts["validation"])
    test_loss, accuracy = evaluate(apply, params, *parts["test"])
    return {
        "validation": validation,
        "accuracy": accuracy,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "steps": int(steps),
        "average_batch": int(used) / int(steps),
        "largest_batch": int(largest),
        "train_seconds": seconds,
    }


def split(dataset: str, folder: str | None) -> dict[str, tuple[jax.Array, jax.Array]]:
    found = data(dataset, folder if dataset == "mnist" else None)
    x, y = found["train"]
    return {
        "train": (x[:-VALIDATION], y[:-VALIDATION]),
        "validation": (x[-VALIDATION:], y[-VALIDATION:]),
        "test": found["test"],
    }


def arguments(task: Task, rate: float, seed: int, folder: str | None) -> tuple[Any, ...]:
    """What a run is given: parameters, data, the order of the examples, the learning rate."""
    x, y = split(task.dataset, folder)["train"]
    params = build_model(task.model, 10).init(jax.random.key(seed), x[:1])
    draw = np.random.default_rng(seed)
    order = np.concatenate([draw.permutation(len(y)) for _ in range(task.epochs)])
    order = np.pad(order, (0, 2 * LARGEST))  # a slice never runs over the end
    return params, x, y, jnp.asarray(order, jnp.int32), jnp.float32(rate)


@functools.lru_cache(maxsize=2)
def compiled(task: Task, policy: str, folder: str | None) -> Any:
    """The whole run, ahead of time: one compilation serves every rate and seed of a policy."""
    given = arguments(task, 0.0, 0, folder)
    made = functools.partial(train, task, (POLICIES | CHOICES)[policy], len(given[2]))
    return jax.jit(made).lower(*given).compile()


def train(task, policy, per_epoch, params, x, y, order, rate):
    """Steps until the examples are used up: the last batch takes those that are left, if they are a
    quarter of it at least. A last step on a handful of examples costs points of accuracy.
    """
    optimizer = RECIPES[task.optimizer](rate, **policy.build(rate, per_epoch))
    gradient = make_gradient(build_model(task.model, 10).apply, policy, x, y, order)
    total = per_epoch * task.epochs

    def step(carry):
        params, state, used, steps, largest = carry
        size = jnp.minimum(adabatch.get_batch_size(state), total - used)
        value, noise = gradient(params, used, size, adabatch.needs_noise(state))
        updates, state = optimizer.update(noise.mean, state, params, noise=noise, value=value)
        largest = jnp.maximum(largest, size)
        return optax.apply_updates(params, updates), state, used + size, steps + 1, largest

    zero = jnp.int32(0)
    start = (params, optimizer.init(params), zero, zero, zero)

    def goes_on(carry):
        _, state, used, _, _ = carry
        return 4 * (total - used) >= adabatch.get_batch_size(state)

    params, _, used, steps, largest = jax.lax.while_loop(goes_on, step, start)
    return params, used, steps, largest


def make_gradient(apply, policy: Policy, x, y, order):
    """`(params, used, size, measure) -> (mean loss, noise)` of `size` examples from `used` on."""

    def losses_fn(params, group):
        index, _ = group
        logits = apply(params, x[index])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y[index])

    def loss_fn(params, group):
        _, real = group
        return jnp.sum(losses_fn(params, group) * real) / jnp.maximum(jnp.sum(real), 1)

    noisy = adabatch.value_and_grad_noise(loss_fn, **(policy.measure or {}))
    signed = adabatch.noise.value_and_grad_signs(losses_fn)
    groups = 4 if policy.measure is None else policy.groups

    def rung(group_size: int, places: int, params, used, size, measure):
        taken = jax.lax.dynamic_slice_in_dim(order, used, places * group_size)
        index = taken.reshape(places, group_size)
        real = jnp.arange(places * group_size).reshape(places, group_size) < size
        count = (size + group_size - 1) // group_size
        given = {"count": count, "sizes": jnp.sum(real, axis=1)}
        if policy.signs:
            return signed(params, (index, real), jax.random.key(used), **given)
        return noisy(params, (index, real), measure=measure, **given)

    if policy.constant:
        return functools.partial(rung, policy.smallest, 1)
    if groups == 0:
        return functools.partial(rung, 1, LARGEST)
    sizes = [policy.smallest // groups * 2**k for k in range(13)]
    sizes = [s for s in sizes if s * groups <= LARGEST]
    rungs = [functools.partial(rung, s, 2 * groups) for s in sizes]

    def climb(params, used, size, measure):
        which = sum((size >= s * groups).astype(jnp.int32) for s in sizes[1:])
        return jax.lax.switch(which, rungs, params, used, size, measure)

    return climb


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(apply, params, x, y):
    def part(xy):
        logits = apply(params, xy[0])
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, xy[1])
        return losses.mean(), jnp.mean(jnp.argmax(logits, axis=-1) == xy[1])

    # Parts that fit the cache: a CNN takes half the time of a tenth of the examples at once.
    pieces = lambda a: a.reshape(100, -1, *a.shape[1:])
    return jax.tree.map(jnp.mean, jax.lax.map(part, (pieces(x), pieces(y))))


def evaluate(apply, params, x, y) -> tuple[float, float]:
    """Mean loss and accuracy."""
    loss, accuracy = _evaluate(apply, params, x, y)
    return float(loss), float(accuracy)
