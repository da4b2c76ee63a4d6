"""One optimizer step with the core alone: `.ci/run` calls this where no extra is installed."""

import sys

import jax.numpy as jnp
import optax

import adabatch_jax as adabatch

controller = adabatch.adapt_batch_size(
    adabatch.norm_test(1.0), initial_batch_size=8, max_batch_size=64
)
optimizer = optax.chain(controller, optax.sgd(0.1))
w, x = jnp.zeros(()), jnp.linspace(-1.0, 1.2, 8)
measure = adabatch.value_and_grad_noise(lambda w, x: jnp.mean((w - x) ** 2))
_, noise = measure(w, adabatch.split_groups(x, 4))
_, state = optimizer.update(noise.mean, optimizer.init(w), w, noise=noise)
assert adabatch.get_batch_size(state) > 8

extras = {"flax", "grain", "matplotlib", "orbax", "rich", "sklearn", "tyro"} & set(sys.modules)
assert not extras, f"importing the core imported {extras}"
assert "site-packages" in adabatch.__file__, f"not the installed package: {adabatch.__file__}"
print("adabatch_jax", adabatch.__version__, "works by itself")
