"""What is known of an operation y = op(x, w) beyond its derivative.

Let δ be the derivative of the loss of one example by y. The gradient of that example by w is what comes
back from δ through the operation. Some have a squared norm that needs no such gradient, or a faster
way to it. A new primitive is one more branch of `formula_of` or of `gradient_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adabatch_jax._tree import widen

_REARRANGING = frozenset(
    """broadcast_in_dim convert_element_type copy expand_dims optimization_barrier reshape rev squeeze
    transpose""".split()  # noqa: SIM905
)


def rearranges(eqn: Any) -> bool:
    """Whether an operation keeps every entry of its operand, once, in whatever order and precision."""
    if eqn.primitive.name not in _REARRANGING:
        return False
    source, target = eqn.invars[0].aval, eqn.outvars[0].aval
    inexact = jnp.issubdtype(target.dtype, jnp.floating)
    return inexact and math.prod(source.shape) == math.prod(target.shape)


class Formula(NamedTuple):
    """Squared norms of the gradients by one operand, all of one operation.

    `squared_norm(eqn, operand, others, delta)` is that of one example, float32; `room` how many numbers it
    holds on the way. `wide`, if there is one, is the operation in float32, where an entry of the gradient
    is one product x·δ: the squares of all entries, added over examples, follow from x² and δ².
    """

    name: str
    squared_norm: Callable[[Any, int, list[Any], Any], Any]
    room: int
    wide: Callable[[Any, Any, Any], Any] | None = None


class Gradient(NamedTuple):
    """The gradient of one example by one operand, and how many numbers that holds on the way."""

    function: Callable[[Any, list[Any], Any], Any]
    room: int


def _product(a: jax.Array, b: jax.Array, spec: str) -> jax.Array:
    dtype = jnp.complex64 if jnp.iscomplexobj(a) or jnp.iscomplexobj(b) else jnp.float32
    return jnp.einsum(spec, a, b, precision="highest", preferred_element_type=dtype)


def _norm_of_factors(x: jax.Array, delta: jax.Array) -> jax.Array:
    """Σ_g ‖X_gᵀ Δ_g‖² of factors X [G, T, A], Δ [G, T, N], without the gradients XᵀΔ.

    T = 1: ‖x‖²·‖δ‖² (Goodfellow 2015, arXiv 1510.01799); otherwise ⟨X Xᵀ, Δ Δᵀ⟩ (Li et al. 2021, arXiv
    2110.05679, "ghost norms").
    """
    if x.shape[1] == 1:
        return jnp.vdot(*(jnp.sum(jnp.square(widen(a)), axis=(1, 2)) for a in (x, delta)))
    return jnp.vdot(*(_product(a, a, "gta,gsa->gts") for a in (x, delta)))


def _of_factors(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], squared_norm: Any, wide: Any = None
) -> Formula | None:
    """Where it takes fewer multiplications than the gradient, T·A·N."""
    ((g, t, a), (_, _, n)) = shapes
    if t == 1:
        return Formula("‖x‖²·‖δ‖²", squared_norm, 1, wide)
    if t * (a + n) < a * n:
        return Formula("⟨x xᵀ, δ δᵀ⟩", squared_norm, 2 * g * t * t)
    return None


def _dot_shapes(eqn: Any, operand: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """[G, T, A] and [G, T, N]: shared axes, the free ones of x, contracted ones, the free ones of w."""
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    contracted, batch = (left, left_batch) if operand == 1 else (right, right_batch)
    x = eqn.invars[1 - operand].aval.shape
    g = math.prod(x[i] for i in batch)
    a = math.prod(x[i] for i in contracted)
    t = math.prod(x) // max(g * a, 1)
    n = math.prod(eqn.outvars[0].aval.shape) // max(g * t, 1)
    return (g, t, a), (g, t, n)


def _dot_factors(eqn: Any, operand: int, x: jax.Array, delta: jax.Array) -> tuple[Any, Any]:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    contracted, batch = (left, left_batch) if operand == 1 else (right, right_batch)
    free = [i for i in range(x.ndim) if i not in {*contracted, *batch}]
    of_x, of_delta = _dot_shapes(eqn, operand)
    x = jnp.transpose(x, (*batch, *free, *contracted)).reshape(of_x)
    if operand == 1:
        return x, delta.reshape(of_delta)
    g, t, n = of_delta
    return x, jnp.swapaxes(delta.reshape(g, n, t), 1, 2)


def _wide_dot(eqn: Any, left: jax.Array, right: jax.Array) -> jax.Array:
    numbers = eqn.params["dimension_numbers"]
    return jax.lax.dot_general(widen(left), widen(right), numbers, precision="highest")


def _dot_norm(eqn: Any, operand: int, others: list[Any], delta: jax.Array) -> jax.Array:
    return _norm_of_factors(*_dot_factors(eqn, operand, others[0], delta))


def _conv_norm(eqn: Any, operand: int, others: list[Any], delta: jax.Array) -> jax.Array:
    return _norm_of_factors(*_conv_factors(eqn, others[0], delta))


def _conv_shapes(eqn: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    numbers, g = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    channels = out[numbers.out_spec[1]]
    t = math.prod(out) // channels
    a = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    return (g, t, a), (g, t, channels // g)


def _conv_factors(eqn: Any, x: jax.Array, delta: jax.Array) -> tuple[Any, Any]:
    """The neighbourhood of every output, and δ there (Rochette et al. 2019, arXiv 1912.06015)."""
    options, (of_x, of_delta) = eqn.params, _conv_shapes(eqn)
    numbers = options["dimension_numbers"]

    def channels_last(a: jax.Array, spec: tuple[int, ...]) -> jax.Array:
        return jnp.transpose(a, (spec[0], *spec[2:], spec[1]))

    x, delta = channels_last(x, numbers.lhs_spec), channels_last(delta, numbers.out_spec)
    spatial = [eqn.invars[1].aval.shape[i] for i in numbers.rhs_spec[2:]]
    edges = zip(options["padding"], options["lhs_dilation"], strict=True)
    padding = [(0, 0, 0), *((low, high, by - 1) for (low, high), by in edges), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
    strides = (1, *options["window_strides"], 1)
    parts = []
    for place in np.ndindex(*spatial):
        start = (0, *(i * by for i, by in zip(place, options["rhs_dilation"], strict=True)), 0)
        length = (len(x), *delta.shape[1:-1], x.shape[-1])
        stop = [s + (n - 1) * by + 1 for s, n, by in zip(start, length, strides, strict=True)]
        parts.append(jax.lax.slice(x, start, stop, strides))
    g, t, a = of_x
    around = jnp.stack(parts, axis=-2).reshape(t, len(parts), g, a // len(parts))
    around = jnp.moveaxis(around, 2, 0).reshape(of_x)
    return around, jnp.moveaxis(delta.reshape(t, g, -1), 1, 0).reshape(of_delta)


def _is_rows(eqn: Any) -> bool:
    """Whether a gather takes whole rows, as an embedding does."""
    numbers, table = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    indices = eqn.invars[1].aval.shape
    dims = tuple(range(len(indices) - 1, len(indices) + len(table) - 2))
    return (
        numbers.offset_dims == dims
        and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *table[1:])
        and math.prod(indices) ** 2 <= math.prod(table)
    )


def _rows_norm(eqn: Any, operand: int, others: list[Any], delta: jax.Array) -> jax.Array:
    """Σ_{t,s} [i_t = i_s] ⟨δ_t, δ_s⟩: rows that are taken twice add up (Li et al. 2021)."""
    (indices,) = others
    mode, length = eqn.params["mode"], eqn.invars[0].aval.shape[0]
    i = indices.reshape(-1)
    if mode == jax.lax.GatherScatterMode.CLIP:
        i = jnp.clip(i, 0, length - 1)
    real = (i >= 0) & (i < length)  # the backward pass drops all others
    delta = delta.reshape(len(i), -1)
    gram = _product(delta, delta, "td,sd->ts")
    same = (i[:, None] == i) & real[:, None] & real
    return jnp.sum(jnp.where(same, gram, 0.0))


def _conv_gradient(eqn: Any, others: list[Any], delta: jax.Array) -> jax.Array:
    """By the kernel: XᵀΔ. The transposed convolution does the same, far more slowly for many at once."""
    numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
    x, delta = _conv_factors(eqn, others[0], delta)
    spatial = [kernel[i] for i in numbers.rhs_spec[2:]]
    found = _product(x, delta, "gta,gtn->gna").reshape(-1, *spatial, kernel[numbers.rhs_spec[1]])
    order = np.argsort(numbers.rhs_spec).tolist()
    return jnp.transpose(jnp.moveaxis(found, -1, 1), order).astype(eqn.invars[1].aval.dtype)


def formula_of(eqn: Any, operand: int | None) -> Formula | None:
    """The formula of the squared norm by an operand that is a parameter as it is, if there is one."""
    if operand is None:
        return None
    if eqn.primitive.name == "dot_general":
        return _of_factors(_dot_shapes(eqn, operand), _dot_norm, _wide_dot)
    if gradient_of(eqn, operand):
        return _of_factors(_conv_shapes(eqn), _conv_norm)
    if eqn.primitive.name == "gather" and operand == 0 and _is_rows(eqn):
        room = 2 * math.prod(eqn.invars[1].aval.shape) ** 2
        return Formula("Σ [i_t = i_s] ⟨δ_t, δ_s⟩", _rows_norm, room)
    return None


def gradient_of(eqn: Any, operand: int | None) -> Gradient | None:
    """The gradient by an operand, where there is a faster way to it than the transposed operation."""
    convolution = eqn.primitive.name == "conv_general_dilated" and operand == 1
    if convolution and eqn.params["batch_group_count"] == 1:
        return Gradient(_conv_gradient, room=math.prod(_conv_shapes(eqn)[0]))
    return None
