"""Batches of any size in one shape, and the compiled functions that measure their curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adabatch_jax as adabatch
from adabatch_jax._tree import dot, squared_norm
from adabatch_jax._types import PyTree
from adabatch_jax.curvature import Spectrum
from adabatch_jax.training.data import Dataset
from adabatch_jax.training.models import Apply, losses_and_logits
from adabatch_jax.training.spectrum._config import SpectrumConfig

Batch = dict[str, jax.Array]


class Batches:
    """Batches of any size in one shape, so that one compilation serves all of them.

    Args:
      dataset: the training examples are taken from it.
      largest: examples of the largest batch.
      max_micro_batch_size: examples of a micro-batch, at most.
    """

    def __init__(self, dataset: Dataset, largest: int, max_micro_batch_size: int) -> None:
        self._dataset = dataset
        self._groups = -(-largest // max_micro_batch_size)
        self._micro = -(-largest // self._groups)

    def of(self, index: np.ndarray) -> tuple[Batch, np.int32]:
        """Training examples as micro-batches, leaves [G, M, …], and how many of them are used.

        The mean over these of the weighted sum of losses is the mean over the examples: those that
        fill the last micro-batch up weigh nothing.
        """
        count = -(-len(index) // self._micro)
        weights = np.zeros(self._groups * self._micro, np.float32)
        weights[: len(index)] = count / len(index)
        shape = self._groups, self._micro
        index = np.resize(index, shape)
        batch = {
            "inputs": jnp.asarray(self._dataset.train_inputs[index]),
            "labels": jnp.asarray(self._dataset.train_labels[index]),
            "weights": jnp.asarray(weights.reshape(shape)),
        }
        return batch, np.int32(count)


class Compiled(NamedTuple):
    """Two jitted functions, for batches of any size."""

    # (params, batch, count, key) → a Lanczos run, the curvature of the loss along its gradient
    of_batch: Callable[..., tuple[Spectrum, jax.Array]]
    # (params, groups, sign, key) → ν² of the Hessian at its upper end, at its lower for the sign −1
    noise_along: Callable[..., jax.Array]


def compile_measures(config: SpectrumConfig, apply: Apply) -> Compiled:
    """Builds the functions; each compiles once per shape of its batches."""

    def loss_fn(params: PyTree, group: Batch) -> jax.Array:
        losses, _ = losses_and_logits(apply, params, group["inputs"], group["labels"])
        return jnp.sum(group["weights"] * losses)

    def logits(params: PyTree, inputs: jax.Array) -> jax.Array:
        return apply(params, inputs).astype(jnp.float32)

    def loss_of_logits(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
        losses, _ = losses_and_logits(lambda _, z: z, None, logits, labels)
        return jnp.sum(weights * losses)

    def gradient(params: PyTree, batch: Batch, count: jax.Array) -> PyTree:
        """Up to a factor: only its direction is needed."""

        def add(i: jax.Array, total: PyTree) -> PyTree:
            group = jax.tree.map(lambda x: x[i], batch)
            return jax.tree.map(jnp.add, total, jax.grad(loss_fn)(params, group))

        return jax.lax.fori_loop(0, count, add, jax.tree.map(jnp.zeros_like, params))

    @jax.jit
    def of_batch(
        params: PyTree, batch: Batch, count: jax.Array, key: jax.Array
    ) -> tuple[Spectrum, jax.Array]:
        hessian = adabatch.curvature.hessian_vector_product(loss_fn, params, batch, count=count)
        product = hessian
        if config.matrix == "gauss-newton":
            parts = batch["inputs"], batch["labels"], batch["weights"]
            product = adabatch.curvature.gauss_newton_vector_product(
                logits, loss_of_logits, params, *parts, count=count
            )
        spectrum = adabatch.curvature.lanczos_spectrum(product, params, key, num_steps=config.steps)
        direction = gradient(params, batch, count)
        square = squared_norm(direction)
        along = dot(direction, hessian(direction)) / jnp.where(square > 0, square, 1.0)
        return spectrum, along

    @jax.jit
    def noise_along(params: PyTree, groups: Batch, sign: jax.Array, key: jax.Array) -> jax.Array:
        # The bottom of the Hessian is the top of that of the negative loss.
        groups = {**groups, "weights": sign * groups["weights"]}
        return adabatch.curvature.hessian_noise(
            loss_fn, params, groups, key, probe=config.noise_probe, num_steps=config.steps
        )

    return Compiled(of_batch, noise_along)
