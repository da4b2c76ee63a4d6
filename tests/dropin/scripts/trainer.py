"""A trainer class that builds its optimizer by a factory, and knows it as `optax.MultiSteps`.

It hands no loss to the optimizer, and logs `gradient_step` and `mini_step` of the state. A line that ends
in `# changed` is one that the growing batch asked for.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen

import adabatch_jax as adabatch
from tests.dropin.scripts.data import digits, order_of

BASE, MICRO = 32, 8
HANDED_IN = {"before": MICRO, "after": MICRO}  # `optax.MultiSteps` had micro-batches before
EXAMPLES = 12_000  # ten epochs


@dataclasses.dataclass(frozen=True)
class Config:
    examples: int = EXAMPLES
    batch_size: int = BASE
    micro_batch_size: int = MICRO
    learning_rate: float = 0.005
    grow: bool = False
    options: tuple[tuple[str, Any], ...] = ()


def get_schedule(config: Config) -> optax.Schedule:
    steps = config.examples // config.batch_size
    return optax.cosine_decay_schedule(config.learning_rate, steps, alpha=0.01)


@functools.cache
def get_optimizer(config: Config) -> optax.GradientTransformation:
    schedule = get_schedule(config)
    if not config.grow:
        every = config.batch_size // config.micro_batch_size
        return optax.MultiSteps(optax.adam(schedule), every).gradient_transformation()
    return adabatch.grow_batch_size(  # changed
        optax.adam,
        learning_rate=schedule,
        base_batch_size=config.batch_size,
        max_batch_size=16 * config.batch_size,
        micro_batch_size=config.micro_batch_size,
        **dict(config.options),
    )


def before(examples: int) -> optax.GradientTransformation:
    return get_optimizer(Config(examples))


def after(examples: int, **options: Any) -> optax.GradientTransformation:
    return get_optimizer(Config(examples, grow=True, options=tuple(options.items())))


class MLP(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        return linen.Dense(10)(linen.relu(linen.Dense(64)(linen.relu(linen.Dense(64)(x)))))


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = MLP().apply(params, x)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


class Trainer:
    def __init__(self, optimizer: optax.GradientTransformation, micro_batch: int) -> None:
        self.optimizer = optimizer
        self.micro_batch = micro_batch
        self.fit = jax.jit(self._fit, static_argnames="calls")

    def step(self, carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        log = {"loss": loss, "step": opt_state.gradient_step, "micro_step": opt_state.mini_step}
        return (params, opt_state), log

    def _fit(self, key: jax.Array, calls: int) -> Any:
        images, labels = map(jnp.asarray, digits()["train"])
        first, order = jax.random.split(key)
        params = MLP().init(first, images[:1])
        rows = order_of(order, len(labels), calls * self.micro_batch, self.micro_batch)
        carry = params, self.optimizer.init(params)
        return jax.lax.scan(
            lambda carry, at: self.step(carry, (images[at], labels[at])), carry, rows
        )

    def evaluate(self, params: Any, x: jax.Array, y: jax.Array) -> tuple[float, float]:
        right = jnp.mean(MLP().apply(params, x).argmax(1) == y)
        return float(loss_fn(params, x, y)), float(right)


trainer_of = functools.cache(Trainer)


def run(optimizer: Any, micro_batch: int, seed: int, examples: int = EXAMPLES) -> dict[str, Any]:
    trainer = trainer_of(optimizer, micro_batch)
    key = jax.random.key(seed)
    (params, opt_state), log = trainer.fit(key, calls=examples // micro_batch)
    loss, accuracy = trainer.evaluate(params, *digits()["test"])
    validation_loss, _ = trainer.evaluate(params, *digits()["validation"])
    return {
        "loss": loss,
        "accuracy": accuracy,
        "validation_loss": validation_loss,
        "steps": int(log["step"][-1]),
        "log": log,
        "opt_state": opt_state,
    }
