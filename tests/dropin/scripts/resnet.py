"""A residual network with batch normalisation, in the shape of Flax's ImageNet example.

`TrainState` with the running statistics, L2 in the loss, momentum with warm-up and cosine, `pmap`.
A line that ends in `# changed` is one that the growing batch asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.training import train_state

import adabatch_jax as adabatch
from tests.dropin.scripts.data import digits, order_of

BASE, MICRO = 64, 16
HANDED_IN = {"before": BASE, "after": MICRO}  # examples per call # changed
EXAMPLES = 9_600  # eight epochs
PEAK, L2 = 1.0, 1e-4


def schedule(examples: int) -> optax.Schedule:
    steps = examples // BASE
    return optax.warmup_cosine_decay_schedule(PEAK / 100, PEAK, steps // 10, steps, PEAK / 1000)


def before(examples: int) -> optax.GradientTransformation:
    return optax.sgd(schedule(examples), momentum=0.9, nesterov=True)


def after(examples: int, **options: Any) -> optax.GradientTransformation:
    return adabatch.grow_batch_size(  # changed
        optax.sgd,
        learning_rate=schedule(examples),
        momentum=0.9,
        nesterov=True,
        base_batch_size=BASE,
        max_batch_size=16 * BASE,
        micro_batch_size=MICRO,
        axis_name="batch",
        **options,
    )


class Block(linen.Module):
    filters: int
    strides: int = 1

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(linen.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = functools.partial(linen.Conv, use_bias=False)
        y = conv(self.filters, (3, 3), self.strides)(x)
        y = linen.relu(norm()(y))
        y = norm(scale_init=linen.initializers.zeros)(conv(self.filters, (3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv(self.filters, (1, 1), self.strides)(x))
        return linen.relu(x + y)


class ResNet(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = linen.Conv(8, (3, 3), use_bias=False)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for filters, strides in ((8, 1), (16, 2)):
            x = Block(filters, strides)(x, train)
        return linen.Dense(10)(x.mean((1, 2)))


class TrainState(train_state.TrainState):
    batch_stats: Any


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def create_train_state(key: jax.Array, optimizer: Any) -> TrainState:
    variables = ResNet().init(key, jnp.zeros((1, 8, 8, 1)), train=False)
    state = TrainState.create(apply_fn=ResNet().apply, tx=optimizer, **variables)
    return state.replace(step=jnp.int32(0))


def train_step(state: TrainState, batch: Any, grown: bool) -> tuple[TrainState, Any]:
    x, y = batch

    def loss_fn(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        squares = sum(jnp.sum(p**2) for p in jax.tree.leaves(params) if p.ndim > 1)
        return cross_entropy(logits, y) + 0.5 * L2 * squares, new["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    if not grown:  # each device hands in its own gradient now # changed
        grads = jax.lax.pmean(grads, "batch")
    state = state.apply_gradients(grads=grads)
    batch_stats = jax.lax.pmean(batch_stats, "batch")
    if grown:
        old = state.batch_stats
        batch_stats = adabatch.unless_skipped(state.opt_state, batch_stats, old)  # changed
    state = state.replace(batch_stats=batch_stats)
    stepped = adabatch.has_updated(state.opt_state) if grown else jnp.bool_(True)
    return state, (jax.lax.pmean(loss, "batch"), stepped)


@functools.cache
def training(optimizer: Any, batch: int, calls: int, broken: int | None) -> Callable[..., Any]:
    """One epoch after the other, on as many devices as there are; all calls in one program."""

    def epochs(state: TrainState, key: jax.Array) -> Any:
        images, labels = map(jnp.asarray, digits()["train"])

        def one(state: TrainState, numbered: Any) -> Any:
            number, rows = numbered
            x = images[rows]
            if broken is not None:
                x = x.at[0, 0, 0].set(jnp.where(number == broken, jnp.nan, x[0, 0, 0]))
            return train_step(state, (x, labels[rows]), grown=batch < BASE)

        order = order_of(key, len(labels), calls * batch, batch)
        return jax.lax.scan(one, state, (jnp.arange(calls), order))

    return jax.pmap(epochs, axis_name="batch", devices=jax.devices()[:1])


@jax.jit
def evaluate(variables: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = ResNet().apply(variables, x, train=False)
    return cross_entropy(logits, y), jnp.mean(logits.argmax(1) == y)


def run(
    optimizer: Any,
    micro_batch: int,
    seed: int,
    examples: int = EXAMPLES,
    *,
    broken: int | None = None,
) -> dict[str, Any]:
    """Trains and evaluates; one pixel of the call `broken` is NaN."""
    init, order = jax.random.split(jax.random.key(seed))
    state = create_train_state(init, optimizer)
    replicated = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
    train = training(optimizer, micro_batch, examples // micro_batch, broken)
    replicated, (losses, stepped) = train(replicated, order[None])
    state = jax.tree.map(lambda leaf: leaf[0], replicated)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    loss, accuracy = evaluate(variables, *digits()["test"])
    validation_loss, _ = evaluate(variables, *digits()["validation"])
    return {
        "loss": float(loss),
        "accuracy": float(accuracy),
        "validation_loss": float(validation_loss),
        "steps": int(stepped.sum()),
        "train_losses": losses[0],
        "batch_stats": state.batch_stats,
        "opt_state": state.opt_state,
    }
