"""Small classifiers of images that show every effect of a batch size and train in seconds.

None of them has batch normalisation: it would tie the gradient of one example to its neighbours in
the micro-batch, and the noise of a batch would no longer follow from the noise of one example.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn


class Logistic(nn.Module):
    """Multinomial logistic regression: one affine map, a convex loss.

    Args:
      num_classes: number of logits.
    """

    num_classes: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps inputs, float [B, H, W], to logits, [B, num_classes]."""
        return nn.Dense(self.num_classes)(_flatten(_checked(inputs)))


class MLP(nn.Module):
    """One hidden layer with ReLU.

    Args:
      num_classes: number of logits.
      width: hidden units.
    """

    num_classes: int
    width: int = 256

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps inputs, float [B, H, W], to logits, [B, num_classes]."""
        hidden = nn.relu(nn.Dense(self.width)(_flatten(_checked(inputs))))
        return nn.Dense(self.num_classes)(hidden)


class CNN(nn.Module):
    """Two 3x3 convolutions, each halved by max-pooling, and a dense layer.

    Args:
      num_classes: number of logits.
      channels: of the two convolutions.
      width: units of the dense layer.
    """

    num_classes: int
    channels: tuple[int, int] = (32, 64)
    width: int = 128

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps inputs, float [B, H, W] with H, W at least 4, to logits, [B, num_classes]."""
        hidden = _checked(inputs)[..., None]  # one grey channel
        for features in self.channels:
            hidden = _max_pool(nn.relu(nn.Dense(features)(_neighbourhoods(hidden))))
        hidden = nn.relu(nn.Dense(self.width)(_flatten(hidden)))
        return nn.Dense(self.num_classes)(hidden)


class PreActResNet(nn.Module):
    """A residual network with pre-activation: 3x3 convolutions, group normalisation, global average.

    The first convolution has a stride of two. Every block adds conv(relu(norm(conv(relu(norm(x)))))) to
    x. A later stage begins with a stride of two, and a block that changes the shape of x sends
    relu(norm(x)) through a 1x1 convolution instead.

    Args:
      num_classes: number of logits.
      channels: of the stages, multiples of `groups`.
      blocks: in a stage.
      groups: of channels that are normalised together, in one example.

    Source: He, Zhang, Ren, Sun (2016), arXiv 1603.05027; Wu and He (2018), arXiv 1803.08494.
    """

    num_classes: int
    channels: tuple[int, ...] = (8, 16, 32)
    blocks: int = 1
    groups: int = 4

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps inputs, float [B, H, W], to logits, [B, num_classes]."""
        hidden = self._convolution(_checked(inputs)[..., None], self.channels[0], stride=2)
        for stage, features in enumerate(self.channels):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                active = self._activated(hidden)
                branch = self._activated(self._convolution(active, features, stride))
                branch = self._convolution(branch, features)
                if hidden.shape != branch.shape:
                    strided = active[:, ::stride, ::stride]
                    hidden = nn.Dense(features, use_bias=False)(strided)
                hidden = hidden + branch
        return nn.Dense(self.num_classes)(jnp.mean(self._activated(hidden), axis=(1, 2)))

    def _convolution(self, images: jax.Array, features: int, stride: int = 1) -> jax.Array:
        # Without a bias: a normalisation follows, which has one.
        around = _neighbourhoods(images)[:, ::stride, ::stride]
        return nn.Dense(features, use_bias=False)(around)

    def _activated(self, images: jax.Array) -> jax.Array:
        return nn.relu(nn.GroupNorm(self.groups)(images))


def _checked(inputs: jax.Array) -> jax.Array:
    # Raw uint8 images would be promoted without a word and train 255 times too large.
    if inputs.ndim != 3 or not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(
            "inputs must be floats of shape [B, H, W] (to_float converts uint8 images), "
            f"got {inputs.dtype} of shape {inputs.shape}"
        )
    return inputs


def _flatten(inputs: jax.Array) -> jax.Array:
    return inputs.reshape(inputs.shape[0], math.prod(inputs.shape[1:]))


def _neighbourhoods(images: jax.Array) -> jax.Array:
    """The 3x3 neighbourhood of every pixel: [B, H, W, C] -> [B, H, W, 9 C], zeros outside.

    A dense layer on it is a 3x3 convolution, with the same parameters and initial values as
    nn.Conv. Written as a matrix product because XLA's CPU compiler is 25 times slower on the weight
    gradient of a convolution inside a loop body than outside (jax-ml/jax#12868), and the groups of
    a batch are such a loop.
    """
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


def _max_pool(images: jax.Array) -> jax.Array:
    """The maximum of each 2x2 window; a last odd row or column is dropped."""
    batch, height, width, channels = images.shape
    windows = images[:, : height // 2 * 2, : width // 2 * 2]
    windows = windows.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return windows.max(axis=(2, 4))
