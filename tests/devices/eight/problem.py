"""One small problem, and every way to run it on devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adabatch_jax as adabatch

LOOPS, LANES, GROUP = 64, 8, 8  # a step has groups [LOOPS, LANES, GROUP]; the lanes are sharded
STEPS, FIRST = 10, 128
Auto = jax.sharding.AxisType.Auto
# What moves the parameters, and the η with which the batch then grows at least 16-fold in STEPS.
INNER = {
    "sgd": (0.25, lambda: optax.sgd(0.15, momentum=0.5)),
    "adam": (0.12, lambda: optax.adam(0.03)),
    "adagrad": (0.25, lambda: optax.adagrad(0.2)),
}


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("data",), (Auto,), devices=jax.devices()[:devices])


@functools.cache
def groups_of(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples of one optimizer step, as many as the largest batch: [LOOPS, LANES, GROUP, …]."""
    rng = np.random.default_rng(step)
    x = rng.normal(size=(LOOPS, LANES, GROUP, 5))
    clean = np.stack([np.sin(x[..., 0]) + x[..., 1], 0.5 * x[..., 2] - x[..., 3]], axis=-1)
    y = clean + 0.5 * rng.normal(size=clean.shape)
    return x.astype(np.float32), y.astype(np.float32)


def first_params(hidden: int = 16) -> dict[str, jax.Array]:
    rng = np.random.default_rng(99)
    shapes = {"w1": (5, hidden), "b1": (1, hidden), "w2": (hidden, 2), "b2": (1, 2)}
    return {
        name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
        for name, shape in shapes.items()
    }


def loss_fn(params: dict[str, jax.Array], batch: Any) -> jax.Array:
    x, y = batch
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] + params["b2"] - y) ** 2)


def optimizer(inner: str = "sgd") -> optax.GradientTransformationExtraArgs:
    eta, direction = INNER[inner]
    return optax.chain(
        adabatch.adapt_batch_size(
            adabatch.norm_test(eta),
            initial_batch_size=FIRST,
            max_batch_size=LOOPS * LANES * GROUP,
            multiple_of=LANES * GROUP,
        ),
        direction(),
    )


def flat(groups: Any) -> Any:
    """[loops, lanes, …] → [groups, …]."""
    return jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), groups)


def fsdp(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings: the longest axis that the devices divide is split; small leaves are replicated."""

    def placement(x: Any) -> jax.NamedSharding:
        axes = [i for i, n in enumerate(x.shape) if n % mesh.size == 0] if x.size >= 16 else []
        if not axes:
            return jax.NamedSharding(mesh, jax.P())
        longest = max(axes, key=lambda i: x.shape[i])
        return jax.NamedSharding(mesh, jax.P(*[None] * longest, "data"))

    return jax.tree.map(placement, tree)


def whole(params: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """All of the sharded parameters on every device, for the length of a step."""
    if mesh is None:
        return params
    return jax.lax.with_sharding_constraint(params, jax.NamedSharding(mesh, jax.P()))


def fused_step(
    axis_name: str | None = None,
    *,
    lanes: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    inner: str = "sgd",
) -> Callable:
    """`(params, state, groups) → (params, state)`: the whole batch at once, by a traced count.

    `mesh`, where the parameters are sharded over it.
    """
    measure = adabatch.value_and_grad_noise(loss_fn, axis_name=axis_name, lanes=lanes)
    link = optimizer(inner)

    def step(params, state, groups):
        loops = adabatch.get_batch_size(state) // (LANES * GROUP)
        lanes_here = jax.tree.leaves(groups)[0].shape[1]
        given, count = (groups, loops) if lanes else (flat(groups), loops * lanes_here)
        value, noise = measure(whole(params, mesh), given, count=count)
        updates, state = link.update(noise.mean, state, params, noise=noise, value=value)
        return optax.apply_updates(params, updates), state

    return step


def drop_in(
    axis_name: str | None = None, inner: str = "sgd", groups: int = 1
) -> optax.GradientTransformationExtraArgs:
    """`groups` of a call. With `axis_name`, those of one device."""
    return adabatch.adaptive_multi_steps(
        optimizer(inner), micro_batch_size=groups * GROUP, axis_name=axis_name
    )


def micro_step(
    axis_name: str | None = None,
    *,
    cast: bool = False,
    lanes: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    inner: str = "sgd",
) -> Callable:
    """The same for one group per device: an ordinary training step around `adaptive_multi_steps`."""

    def step(params, state, groups):
        link = drop_in(axis_name, inner)
        own = jax.lax.pcast(params, axis_name, to="varying") if cast else params
        (group,) = zip(*(iter(x) for x in flat(groups)), strict=True)
        value, gradient = jax.value_and_grad(loss_fn)(own, group)
        updates, state = link.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state

    def step_with_lanes(params, state, groups):  # no device has a gradient of its own to hand in
        link = drop_in(None, inner, groups=groups[0].shape[1])
        measure = adabatch.value_and_grad_noise(loss_fn, lanes=True)
        value, noise = measure(whole(params, mesh), groups)
        updates, state = link.update(noise.mean, state, params, noise=noise, value=value)
        return optax.apply_updates(params, updates), state

    return step_with_lanes if lanes else step


def as_fsdp(step: Callable, mesh: jax.sharding.Mesh, *arguments: Any) -> Callable:
    """`step(a, b, groups)` under jit, with `a`, `b` and what comes back sharded by `fsdp`."""
    back = fsdp(jax.eval_shape(step, *arguments), mesh)
    by_lanes = jax.NamedSharding(mesh, jax.P(None, "data"))
    placed = (*fsdp(arguments[:2], mesh), by_lanes)
    return jax.jit(step, in_shardings=placed, out_shardings=back)


def on_devices(kind: str, step: Callable, devices: int = 8) -> Callable:
    """`step(a, b, groups)` with `a` and `b` on every device, and the lanes of `groups` spread.

    With "FSDP", `a` and `b` are spread, too.
    """
    mesh = mesh_of(devices)
    everywhere, by_lanes = (jax.NamedSharding(mesh, s) for s in (jax.P(), jax.P(None, "data")))
    mapped = None

    def cut(x):  # pmap wants an axis as long as there are devices
        return x.reshape((x.shape[0], devices, -1, *x.shape[2:]))

    if kind == "pmap":
        mapped = jax.pmap(
            step, "data", in_axes=(None, None, 1), out_axes=None, devices=mesh.devices.tolist()
        )
    elif kind == "sharded jit":
        mapped = jax.jit(step)
    elif kind.startswith("shard_map"):
        mapped = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(jax.P(), jax.P(), jax.P(None, "data")),
                out_specs=jax.P(),
                check_vma=kind == "shard_map checked",
            )
        )

    def run(a, b, groups):
        nonlocal mapped
        if mapped is None:  # "FSDP": the shardings follow from the shapes
            mapped = as_fsdp(step, mesh, a, b, groups)
        a, b = jax.device_put((a, b), fsdp((a, b), mesh) if kind == "FSDP" else everywhere)
        groups = jax.tree.map(cut, groups) if kind == "pmap" else jax.device_put(groups, by_lanes)
        # One call at a time: on few cores, calls that wait for each other's devices can starve.
        return jax.block_until_ready(mapped(a, b, groups))

    return run


class Run(NamedTuple):
    """What a run left behind, optimizer step by optimizer step."""

    sizes: list[int]  # batch size decided
    required: list[float]  # what the test asked for
    params: list[dict[str, np.ndarray]]

    def add(self, params: Any, state: Any) -> None:
        shown = adabatch.metrics(jax.device_get(state))
        self.sizes.append(int(shown["next_batch_size"]))
        self.required.append(float(shown["required_batch_size"]))
        self.params.append(jax.device_get(params))


def train_fused(step: Callable, inner: str = "sgd") -> Run:
    run, params, state = Run([], [], []), first_params(), optimizer(inner).init(first_params())
    for index in range(STEPS):
        params, state = step(params, state, groups_of(index))
        run.add(params, state)
    return run


def train_drop_in(step: Callable, devices: int) -> Run:
    """The same examples, one group per device and call."""
    run, params, state = Run([], [], []), first_params(), drop_in().init(first_params())
    for index in range(STEPS):
        groups = groups_of(index)
        for first in range(0, int(adabatch.get_batch_size(state)) // GROUP, devices):
            loop, lane = divmod(first, LANES)
            one_each = tuple(x[loop : loop + 1, lane : lane + devices] for x in groups)
            params, state = step(params, state, one_each)
        assert adabatch.has_updated(state)
        run.add(params, state)
    return run
