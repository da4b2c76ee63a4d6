"""How does it fit my framework?

Plain JAX and Optax need nothing from here: everything in this library is an Optax transformation. What
a framework adds, a train state, a model that is changed in place, leaves that are no arrays, has a file
here. Each imports its framework and nothing else, and nothing imports it but you:

* `adabatch_jax.integrations.flax`: `TrainState` for Flax linen, which hands loss and noise to the
  optimizer and keeps batch statistics clean.
* `adabatch_jax.integrations.nnx`: `value_and_grad_noise` of an nnx model, with a dropout key for every
  group, and `unless_skipped`.
* `adabatch_jax.integrations.equinox`: `value_and_grad_noise` and `for_models`, for models as they are.

docs/adopt.md has a whole training loop for each.
"""
