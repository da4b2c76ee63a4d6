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
STEPS = 16
Auto = jax.sharding.AxisType.Auto


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


def first_params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(99)
    shapes = {"w1": (5, 12), "b1": (1, 12), "w2": (12, 2), "b2": (1, 2)}
    return {
        name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
        for name, shape in shapes.items()
    }


def loss_fn(params: dict[str, jax.Array], batch: Any) -> jax.Array:
    x, y = batch
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] + params["b2"] - y) ** 2)


def optimizer(eta: float = 0.25) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        adabatch.adapt_batch_size(
            adabatch.norm_test(eta),
            initial_batch_size=128,
            max_batch_size=LOOPS * LANES * GROUP,
            multiple_of=LANES * GROUP,
        ),
        optax.sgd(0.1, momentum=0.5),
    )


def flat(groups: Any) -> Any:
    """[loops, lanes, …] → [groups, …]."""
    return jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), groups)


def fused_step(axis_name: str | None = None, lanes: bool = False) -> Callable:
    """`(params, state, groups) → (params, state)`: the whole batch at once, by a traced count."""
    measure = adabatch.value_and_grad_noise(loss_fn, axis_name=axis_name, lanes=lanes)
    link = optimizer()

    def step(params, state, groups):
        loops = adabatch.get_batch_size(state) // (LANES * GROUP)
        lanes_here = jax.tree.leaves(groups)[0].shape[1]
        given = groups if lanes else flat(groups)
        value, noise = measure(params, given, count=loops if lanes else loops * lanes_here)
        updates, state = link.update(noise.mean, state, params, noise=noise, value=value)
        return optax.apply_updates(params, updates), state

    return step


def drop_in(axis_name: str | None = None) -> optax.GradientTransformationExtraArgs:
    return adabatch.adaptive_multi_steps(optimizer(), micro_batch_size=GROUP, axis_name=axis_name)


def micro_step(axis_name: str | None = None, cast: bool = False) -> Callable:
    """The same for one group per device: an ordinary training step around `adaptive_multi_steps`."""
    link = drop_in(axis_name)

    def step(params, state, groups):
        own = jax.lax.pcast(params, axis_name, to="varying") if cast else params
        (group,) = zip(*(iter(x) for x in flat(groups)), strict=True)
        value, gradient = jax.value_and_grad(loss_fn)(own, group)
        updates, state = link.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return step


def on_devices(kind: str, step: Callable, devices: int = 8) -> Callable:
    """`step(a, b, groups)` with `a` and `b` on every device, and the lanes of `groups` spread."""
    mesh = mesh_of(devices)
    everywhere, by_lanes = (jax.NamedSharding(mesh, s) for s in (jax.P(), jax.P(None, "data")))

    def cut(x):  # pmap wants an axis as long as there are devices
        return x.reshape((x.shape[0], devices, -1, *x.shape[2:]))

    if kind == "pmap":
        mapped = jax.pmap(
            step, "data", in_axes=(None, None, 1), out_axes=None, devices=mesh.devices.tolist()
        )
    elif kind == "sharded jit":
        mapped = jax.jit(step)
    else:
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
        a, b = jax.device_put((a, b), everywhere)
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
        self.sizes.append(int(shown["batch_size"]))
        self.required.append(float(shown["required_batch_size"]))
        self.params.append(jax.device_get(params))


def train_fused(step: Callable) -> Run:
    run, params, state = Run([], [], []), first_params(), optimizer().init(first_params())
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
