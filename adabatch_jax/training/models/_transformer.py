"""A small causal transformer over bytes: what a language model is, at a size that trains on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

_EMBEDDING_DEVIATION = 0.02


class Transformer(nn.Module):
    """A causal transformer with layer normalisation before each branch and learned positions.

    x = E[bytes] + P, then in every block x += attention(norm(x)) and x += MLP(norm(x)) with a hidden
    layer of 4·width and GELU; logits = norm(x) Eᵀ. The embedding serves at both ends: half of the
    parameters would lie there otherwise, and most bytes are rare. No example sees another.

    Args:
      num_classes: size of the alphabet, both of the inputs and of the logits (256 for bytes).
      max_length: L, the longest sequence.
      width: channels, a multiple of `heads`.
      depth: blocks.
      heads: of the attention.
      dropout: probability that a channel of a branch is dropped, in [0, 1). Where it is positive,
        `apply` needs `rngs={"dropout": key}`, or `deterministic=True`.
    """

    num_classes: int
    max_length: int = 128
    width: int = 64
    depth: int = 2
    heads: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: jax.Array, deterministic: bool = False) -> jax.Array:
        """Maps inputs, integers [B, L], to logits, [B, L, num_classes]: row t sees inputs 0 … t."""
        length = _checked_length(inputs, self.max_length)
        initial = nn.initializers.normal(_EMBEDDING_DEVIATION)
        embed = nn.Embed(self.num_classes, self.width, embedding_init=initial)
        positions = self.param("positions", initial, (self.max_length, self.width))
        # int32: an index of 256 rows by uint8 could not express the number of rows.
        hidden = embed(inputs.astype(jnp.int32)) + positions[None, :length]
        mask = nn.make_causal_mask(inputs)
        for _ in range(self.depth):
            attention = nn.MultiHeadDotProductAttention(self.heads)
            hidden = hidden + self._dropped(
                attention(nn.LayerNorm()(hidden), mask=mask), deterministic
            )
            branch = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(hidden)))
            hidden = hidden + self._dropped(nn.Dense(self.width)(branch), deterministic)
        return embed.attend(nn.LayerNorm()(hidden))

    def _dropped(self, branch: jax.Array, deterministic: bool) -> jax.Array:
        return nn.Dropout(self.dropout, deterministic=deterministic)(branch)


def _checked_length(inputs: jax.Array, max_length: int) -> int:
    if inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError(
            f"inputs must be integers of shape [B, L], got {inputs.dtype} of shape {inputs.shape}"
        )
    if inputs.shape[1] > max_length:
        raise ValueError(
            f"inputs must have at most max_length={max_length} columns, got {inputs.shape[1]}"
        )
    return inputs.shape[1]
