"""Flax linen: a train state that hands the loss and the noise on to its optimizer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training import train_state

from adabatch_jax import _validate
from adabatch_jax._tree import widen
from adabatch_jax._types import PyTree
from adabatch_jax.batch_size import has_updated, metrics, unless_skipped
from adabatch_jax.noise import GradientNoise

__all__ = ["TrainState"]


def _nothing() -> None:
    return None


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, whose `apply_gradients` tells the optimizer the loss and the noise.

    Use it in place of `flax.training.train_state.TrainState`, or as the base of your own. It differs in
    four things:

    * `apply_gradients` forwards `value=`, `noise=`, `num_examples=` and every other keyword that is no
      field to `tx.update`.
    * Fields that are handed to it, such as `batch_stats=`, stay as they were where the micro-batch was
      skipped for NaN or inf: see `unless_skipped`.
    * `step` counts calls of `apply_gradients`, as in Flax. With `adaptive_multi_steps` that is one per
      micro-batch, which is right for `jax.random.fold_in(key, state.step)`. `optimizer_steps` counts the
      steps of the optimizer, and is what belongs beside a learning rate.
    * With `create(..., ema_decay=0.999)`, `ema_params` is an average of the parameters in float32 at least:
      ema ← ρ ema + (1 − ρ) params after every optimizer step, and not in between. To forget at the same
      pace per example while the batch grows, average by `learning_rate.scaled_average` instead.

    Attributes:
      batch_stats: what the model collects, such as running statistics; None without.
      ema_params: the average, like `params`; None without `ema_decay`.
      ema_decay: ρ in [0, 1), static.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import linen
      >>> import adabatch_jax as adabatch
      >>> model = linen.Dense(1)
      >>> x, y = jnp.arange(8.0)[:, None], jnp.ones((8, 1))
      >>> controller = adabatch.adapt_batch_size(
      ...     adabatch.norm_test(0.5), initial_batch_size=4, max_batch_size=8)
      >>> tx = adabatch.adaptive_multi_steps(
      ...     optax.chain(controller, optax.sgd(0.01)), micro_batch_size=2)
      >>> params = model.init(jax.random.key(0), x)
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((model.apply(params, x) - y) ** 2)
      >>> @jax.jit
      ... def step(state, x, y):
      ...     value, grads = jax.value_and_grad(loss_fn)(state.params, x, y)
      ...     return state.apply_gradients(grads=grads, value=value)
      >>> for i in (0, 2, 4, 6):
      ...     state = step(state, x[i:i + 2], y[i:i + 2])
      >>> int(state.step), int(state.optimizer_steps), int(adabatch.metrics(state)["num_examples"])
      (4, 1, 4)

      Fused, all groups of a batch in one call:

      >>> tx = optax.chain(controller, optax.sgd(0.01))
      >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
      >>> fn = adabatch.value_and_grad_noise(lambda params, group: loss_fn(params, *group))
      >>> @jax.jit
      ... def step(state, groups):
      ...     value, noise = fn(state.params, groups, count=adabatch.get_batch_size(state) // 2)
      ...     return state.apply_gradients(grads=noise.mean, value=value, noise=noise)
      >>> state = step(state, adabatch.split_groups((x, y), 4))
      >>> int(state.optimizer_steps), int(adabatch.metrics(state)["num_examples"])
      (1, 4)

    Source: the class is flax.training's; forwarding, guard and average are ours.
    """

    # By a factory: a default that is an attribute of the class would come back in a subclass that declares
    # `batch_stats: Any` once more, as many do, and fields without a default could not follow it.
    batch_stats: Any = struct.field(default_factory=_nothing, kw_only=True)
    ema_params: Any = struct.field(default_factory=_nothing, kw_only=True)
    ema_decay: float | None = struct.field(
        pytree_node=False, default_factory=_nothing, kw_only=True
    )

    @property
    def optimizer_steps(self) -> jax.Array:
        """Steps that the optimizer has made, int32 scalar: batches, not micro-batches."""
        return metrics(self.opt_state)["optimizer_steps"]

    def apply_gradients(
        self,
        *,
        grads: PyTree,
        value: Any = None,
        noise: GradientNoise | None = None,
        num_examples: Any = None,
        **more: Any,
    ) -> Self:
        """The state after one micro-batch, or after one batch if the noise is handed in.

        Args:
          grads: gradient, in the structure of `params`; `noise.mean` where the noise is given.
          value: the mean loss, a scalar.
          noise: as measured by `value_and_grad_noise`.
          num_examples: examples, or tokens, behind the gradient: see `adaptive_multi_steps`.
          **more: fields to replace, by name, and what else `tx.update` reads. A keyword that is no field
            goes to the optimizer, which ignores what it does not know, so mind the spelling of fields.

        Returns:
          The new state, `step` one higher.

        Raises:
          ValueError: a field of another structure than before; what `tx.update` raises.
        """
        names = {field.name for field in dataclasses.fields(self)}
        carried = {name: more.pop(name) for name in names & set(more)}
        told = dict(value=value, noise=noise, num_examples=num_examples)
        told = {name: x for name, x in told.items() if x is not None} | more
        # Flax's own method does the rest, with the keywords bound to the optimizer that it calls.
        update = functools.partial(optax.with_extra_args_support(self.tx).update, **told)
        bound = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        new = train_state.TrainState.apply_gradients(bound, grads=grads)
        before = {name: getattr(self, name) for name in carried}
        fields = unless_skipped(new.opt_state, carried, before)
        if self.ema_decay is not None:
            average = optax.incremental_update(new.params, self.ema_params, 1 - self.ema_decay)
            moved = has_updated(new.opt_state)
            fields["ema_params"] = optax.tree.where(moved, average, self.ema_params)
        return new.replace(tx=self.tx, **fields)

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Any,
        params: PyTree,
        tx: Any,
        ema_decay: float | None = None,
        **fields: Any,
    ) -> Self:
        """A state at step 0, with the optimizer's state made and the average at the parameters.

        Args:
          apply_fn: usually `model.apply`.
          params: what is trained; the optimizer's state is made for it.
          tx: an Optax transformation, such as `adaptive_multi_steps(...)`.
          ema_decay: ρ in [0, 1) of the average of the parameters; None: there is none. The optimizer must
            then contain `adapt_batch_size`.
          **fields: the other fields, such as `batch_stats=`.

        Returns:
          A `TrainState`.

        Raises:
          ValueError: `ema_decay` outside [0, 1).
        """
        if ema_decay is not None:
            _validate.between("TrainState", 0.0, 1.0, ema_decay=ema_decay)
            fields["ema_params"] = jax.tree.map(jnp.copy, widen(params))
        state = super().create(
            apply_fn=apply_fn, params=params, tx=tx, ema_decay=ema_decay, **fields
        )
        # Flax begins with a Python integer, for which a step would be traced twice.
        return state.replace(step=jnp.zeros((), jnp.int32))
