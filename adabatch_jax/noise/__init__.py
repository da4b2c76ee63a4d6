"""How noisy is this gradient?

A batch is a set of groups, each with its mean gradient. One result type, `GradientNoise`, holds the
overall mean and the scatter of the groups around it, whichever way the groups came about: single
examples, micro-batches that accumulation makes anyway, devices. `merge_noise` joins two of them.

* `value_and_grad_noise` takes the gradient of a loss over groups and measures the noise on the way.
* `split_groups` cuts a batch into groups.
* `value_and_grad_signs` is for batches that cannot be cut: random signs, one backward pass more.
* `recommend_estimator` compares them by cost and by standard error.

A model that is more than arrays is taken apart before and put together inside the loss, by
`eqx.partition` and `eqx.combine`, or by `nnx.split` and `nnx.merge`: `adabatch_jax.integrations` does it.

Batch normalisation works, with each group normalised by itself. Return the new statistics as aux, and
they come back as their mean over the groups. Dropout works, with a key for each group as a leaf of
`groups`, `jax.random.split(key, num_groups)`. A key that groups share repeats their dropout, whose noise
is then not seen:

    def loss_fn(params, group, batch_stats):
        x, y, key = group
        logits, new = model.apply({"params": params, "batch_stats": batch_stats}, x,
                                  rngs={"dropout": key}, mutable=["batch_stats"])
        return cross_entropy(logits, y), new["batch_stats"]

    (value, batch_stats), noise = value_and_grad_noise(loss_fn, has_aux=True)(params, groups, batch_stats)

Parameters may be complex: norms, scatter and inner products are those of real and imaginary parts.

Parameters and models may be bfloat16: statistics are float32 all the same. A float16 model wants its
loss scaled, lest small gradients become 0, and the scale halved when one overflows. Mean and scatter are
measured on the scaled loss and unscaled in float32, before anything reads them. One group that
overflows makes the mean NaN or inf: `optax.apply_if_finite` drops that step, batch size and all, and
counts it.

    >>> import jax, jax.numpy as jnp, optax
    >>> import adabatch_jax as adabatch
    >>> def loss_fn(w, x):  # in float16; the parameters are float32
    ...     return 0.5 * jnp.mean((w.astype(jnp.float16) - x) ** 2)
    >>> def scaled_loss_fn(w, x, scale):
    ...     value = loss_fn(w, x).astype(jnp.float32)
    ...     return scale * value, value
    >>> measure = value_and_grad_noise(scaled_loss_fn, has_aux=True)
    >>> optimizer = optax.apply_if_finite(optax.chain(
    ...     adabatch.adapt_batch_size(adabatch.norm_test(0.2), initial_batch_size=4, max_batch_size=64),
    ...     optax.sgd(0.1)), max_consecutive_errors=30)
    >>> @jax.jit
    ... def step(w, state, scale, good_steps, groups):
    ...     (_, value), noise = measure(w, groups, scale)
    ...     mean = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, noise.mean)
    ...     noise = noise._replace(mean=mean, scatter=noise.scatter / scale**2)
    ...     updates, state = optimizer.update(mean, state, w, value=value, noise=noise)
    ...     good_steps = jnp.where(state.last_finite, good_steps + 1, 0)
    ...     grown = jnp.where((good_steps > 0) & (good_steps % 2000 == 0), 2 * scale, scale)
    ...     scale = jnp.where(state.last_finite, grown, scale / 2)
    ...     return optax.apply_updates(w, updates), state, scale, good_steps
    >>> groups = split_groups(jnp.array([1.0, 3.0, 5.0, 7.0], jnp.float16), 4)
    >>> w = jnp.array(0.0)
    >>> carry = w, optimizer.init(w), jnp.float32(2.0**16), jnp.int32(0)
    >>> for _ in range(4):
    ...     carry = step(*carry, groups)
    ...     print(float(carry[2]), round(float(carry[0]), 4), int(adabatch.get_batch_size(carry[1])))
    32768.0 0.0 4
    16384.0 0.0 4
    8192.0 0.0 4
    8192.0 0.4 11
    >>> int(carry[1].total_notfinite)
    3

With `adaptive_multi_steps` divide the gradient of each micro-batch by the scale and hand in the loss as
it is: one that overflows is skipped and counted. A coordinate scatter is unscaled as the scatter is. The
inner products want a forward pass along the scaled gradient, which float16 cannot hold: not with a scale.

For other rooms: what `adaptive_multi_steps` needs to merge noise itself (`join_noise`, `blend`,
`squared_gaps`, `pool_noise` over devices, `unless_measured` and its mark `UNMEASURED`).
"""

from adabatch_jax.noise._estimate import value_and_grad_noise
from adabatch_jax.noise._gradient_noise import GradientNoise, merge_noise
from adabatch_jax.noise._groups import split_groups
from adabatch_jax.noise._recommend import Recommendation, recommend_estimator
from adabatch_jax.noise._signs import value_and_grad_signs

__all__ = [
    "GradientNoise",
    "Recommendation",
    "merge_noise",
    "recommend_estimator",
    "split_groups",
    "value_and_grad_noise",
    "value_and_grad_signs",
]

# For other rooms: no part of the public interface.
from adabatch_jax.noise._gradient_noise import (
    UNMEASURED as UNMEASURED,
    blend as blend,
    join_noise as join_noise,
    pool_noise as pool_noise,
    squared_gaps as squared_gaps,
    unless_measured as unless_measured,
)
