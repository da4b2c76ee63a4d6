"""What `adaptive_multi_steps` gathers: the calls since the last step joined, as pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adabatch_jax._axes import checked_axes
from adabatch_jax._tree import cast_like
from adabatch_jax._types import PyTree
from adabatch_jax.batch_size._call import Call, given_call, measure_call
from adabatch_jax.batch_size._trained import Leaves
from adabatch_jax.noise import UNMEASURED, GradientNoise, blend, join_noise, unless_measured


@dataclass(frozen=True)
class Wrapping:
    """The static arguments of `adaptive_multi_steps`."""

    micro_batch_size: int | None
    axes: tuple[str, ...]
    coordinate_wise: bool

    def num_devices(self) -> int:
        """Of all axes; known only while tracing."""
        devices = 1
        for axis in self.axes:
            devices *= jax.lax.axis_size(axis)
        return devices

    def unit(self) -> int | None:
        """Examples that one call of all devices adds; None if every call tells."""
        return None if self.micro_batch_size is None else self.micro_batch_size * self.num_devices()


class Gathered(NamedTuple):
    """The calls since the last step, joined."""

    noise: GradientNoise  # of the trained leaves, lists
    frozen: list[jax.Array]  # mean gradients of the leaves that are not trained, but looked at
    loss: jax.Array  # float32: their mean

    def gradient(self, parts: Leaves, updates: PyTree) -> PyTree:
        """The mean gradient, like `updates`."""
        return cast_like(parts.joined(updates, self.noise.mean, self.frozen), updates)

    def shown(
        self, parts: Leaves, updates: PyTree, before: GradientNoise, measure: jax.Array
    ) -> GradientNoise:
        """The noise as the optimizer inside sees it: zero where parameters are frozen."""
        noise = self.noise._replace(
            mean=cast_like(parts.joined(updates, self.noise.mean), updates),
            coordinate_scatter=parts.joined(
                before.coordinate_scatter, self.noise.coordinate_scatter
            ),
        )
        return unless_measured(noise, measure)

    def left(self, parts: Leaves, before: GradientNoise, empty: jax.Array) -> GradientNoise:
        """What the state keeps: without examples, where `empty` (int32) is 0 instead of 1.

        The running mean needs no clearing: without examples a side has no weight in a merge.
        """
        counts = ("num_examples", "num_groups")
        return self.noise._replace(
            **{k: getattr(self.noise, k).astype(jnp.int32) * empty for k in counts},
            mean=parts.joined(before.mean, self.noise.mean, self.frozen, rest=lambda x: x),
            coordinate_scatter=parts.joined(
                before.coordinate_scatter, self.noise.coordinate_scatter
            ),
            inner_product_scatter=None,
        )


def call_of(
    wrapping: Wrapping,
    parts: Leaves,
    updates: PyTree,
    noise: GradientNoise | None,
    value: Any,
    size: Any,
    before: GradientNoise,
    measure: jax.Array,
) -> Call:
    """One call: its noise as given, or else its gradient as one group of `size` examples per device."""
    frozen = parts.frozen_part(updates)
    if noise is not None:
        return given_call(parts.noise_of_trained(noise), frozen, value, measure)
    return measure_call(
        parts.trained_part(updates),
        frozen,
        value,
        size,
        gathered=parts.trained_part(before.mean),
        measure=measure,
        coordinate_wise=wrapping.coordinate_wise,
        axes=wrapping.axes,
    )


def gather(
    parts: Leaves,
    before: GradientNoise,
    loss: jax.Array,
    call: Call,
    inner_product_scatter: Any,
    measure: jax.Array,
) -> Gathered:
    """What was gathered `before`, with a mean `loss`, and one more call.

    The inner products of a call refer to its own mean, so they are those of the batch only if the call is
    the first; after others they count as not measured.
    """
    joint = join_noise(parts.noise_of_trained(before), call.noise, measure, call.gaps)
    n_old, n_new = (x.num_examples.astype(jnp.float32) for x in (before, call.noise))
    old = (parts.frozen_part(before.mean), loss)
    frozen, mean_loss = blend(n_old, old, n_new, (call.frozen, call.loss))
    if inner_product_scatter is not None:
        alone = before.num_examples == 0
        scatter = jnp.where(alone, inner_product_scatter, UNMEASURED)
        joint = joint._replace(inner_product_scatter=scatter)
    return Gathered(joint, frozen, mean_loss)


def averaged_already(wrapping: Wrapping, found: GradientNoise) -> jax.Array | bool:
    """Whether the gradient of a call that `found` this noise was averaged over the devices before."""
    devices = wrapping.num_devices()
    if devices == 1 or checked_axes(wrapping.axes):  # shard_map's varying check tells by itself
        return False
    # Devices that hold the same gradient differ by the rounding of a mean over them.
    rounding = 1e-12 + 1e-16 * devices**2  # squared and relative, float32
    alike = found.scatter <= rounding * found.num_examples * found.squared_norm
    return alike & (found.num_groups > 1) & (found.squared_norm > 0)
