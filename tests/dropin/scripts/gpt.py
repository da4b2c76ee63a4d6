"""A small GPT, in the shape of the scripts that train one.

AdamW with a tree of booleans for weight decay, clipping, warm-up and cosine, dropout, rows that are
filled up with zeros (so that a loss is a mean over tokens, not over rows), an average of the parameters.
Batch sizes are tokens. A line that ends in `# changed` is one that the growing batch asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen

import adabatch_jax as adabatch
from tests.dropin.scripts.data import order_of, paragraphs

LENGTH, WIDTH, LAYERS, HEADS = 32, 32, 2, 2
ROWS, MICRO_ROWS = 32, 8
HANDED_IN = {"before": ROWS, "after": MICRO_ROWS}  # rows per call # changed
EXAMPLES = 9_600  # rows
PEAK, DECAY = 0.01, 0.98  # of the learning rate; of the average
PACE = adabatch.learning_rate.scaled_average(DECAY)


@functools.cache
def tokens_in(rows: int) -> int:
    """On average, without what only fills up."""
    return round(rows * float(paragraphs(LENGTH)["train"][1].sum(1).mean()))


def schedule(examples: int) -> optax.Schedule:
    steps = examples // ROWS
    return optax.warmup_cosine_decay_schedule(PEAK / 100, PEAK, steps // 10, steps, PEAK / 100)


def make_optimizer(learning_rate: Any) -> optax.GradientTransformation:
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    mask = jax.tree.map(lambda p: p.ndim > 1, shapes)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate, b2=0.95, weight_decay=0.1, mask=mask),
    )


def before(examples: int) -> optax.GradientTransformation:
    return make_optimizer(schedule(examples))


def after(examples: int, **options: Any) -> optax.GradientTransformation:
    return adabatch.grow_batch_size(  # changed
        make_optimizer,
        learning_rate=schedule(examples),
        base_batch_size=tokens_in(ROWS),
        max_batch_size=16 * tokens_in(ROWS),
        micro_batch_size=None,
        **options,
    )


class GPT(linen.Module):
    @linen.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        embed = linen.Embed(128, WIDTH)
        where = self.param("where", linen.initializers.normal(0.02), (1, LENGTH, WIDTH))
        drop = functools.partial(linen.Dropout(0.05), deterministic=not train)
        x = drop(embed(tokens) + where)
        mask = linen.make_causal_mask(tokens)
        for _ in range(LAYERS):
            y = linen.LayerNorm()(x)
            x = x + drop(linen.MultiHeadDotProductAttention(HEADS)(y, y, mask=mask))
            y = linen.Dense(4 * WIDTH)(linen.LayerNorm()(x))
            x = x + drop(linen.Dense(WIDTH)(linen.gelu(y)))
        return linen.Dense(128)(linen.LayerNorm()(x))


def init(key: jax.Array) -> Any:
    return GPT().init(key, jnp.zeros((1, LENGTH), jnp.int32), train=False)


def loss_fn(params: Any, rows: jax.Array, weights: jax.Array, key: Any = None) -> jax.Array:
    """The mean over tokens."""
    rngs = {} if key is None else {"dropout": key}
    logits = GPT().apply(params, rows[:, :-1], train=key is not None, rngs=rngs)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    return jnp.sum(weights * losses) / jnp.sum(weights)


@functools.cache
def training(optimizer: Any, batch: int, calls: int) -> Callable[..., Any]:
    optimizer, grown = optax.with_extra_args_support(optimizer), batch < ROWS

    @jax.jit
    def train(key: jax.Array) -> Any:
        rows, weights = map(jnp.asarray, paragraphs(LENGTH)["train"])
        first, order, dropout = jax.random.split(key, 3)

        def step(carry: Any, batch_and_key: Any) -> Any:
            params, average, opt_state = carry
            at, key = batch_and_key
            loss, grads = jax.value_and_grad(loss_fn)(params, rows[at], weights[at], key)
            tokens = weights[at].sum()
            updates, opt_state = optimizer.update(
                grads,
                opt_state,
                params,
                value=loss,
                num_examples=tokens,  # changed
            )
            params = optax.apply_updates(params, updates)
            weight = 1.0 - DECAY
            if grown:
                size = adabatch.get_batch_size(carry[2])  # of the step that this call may complete
                weight = 1.0 - PACE(size, tokens_in(ROWS))  # changed
            stepped = adabatch.has_updated(opt_state) if grown else jnp.bool_(True)
            average = optax.incremental_update(
                params, average, jnp.where(stepped, weight, 0.0)
            )  # changed
            return (params, average, opt_state), (loss, stepped)

        params = init(first)
        carry = params, params, optimizer.init(params)
        keys = jax.random.split(dropout, calls)
        return jax.lax.scan(step, carry, (order_of(order, len(rows), calls * batch, batch), keys))

    return train


evaluate = jax.jit(loss_fn)


def run(optimizer: Any, micro_batch: int, seed: int, examples: int = EXAMPLES) -> dict[str, Any]:
    """Trains, and evaluates the average of the parameters, in nats per byte."""
    train = training(optimizer, micro_batch, examples // micro_batch)
    (params, average, opt_state), (losses, stepped) = train(jax.random.key(seed))
    held_out = paragraphs(LENGTH)
    return {
        "loss": float(evaluate(average, *held_out["test"])),
        "loss_of_last": float(evaluate(params, *held_out["test"])),
        "validation_loss": float(evaluate(average, *held_out["validation"])),
        "steps": int(stepped.sum()),
        "train_losses": losses,
        "opt_state": opt_state,
    }
