"""What the structured form costs, read from the compiled programs: FLOPs and memory, over a plain step."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import adabatch_jax as adabatch
from adabatch_jax.noise._structured._estimate import value_and_grad_structured
from adabatch_jax.training.models import CNN, Transformer


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(256)(nn.relu(nn.Dense(256)(x)))))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x[..., None]))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


# Batch, shape of an example; at most: FLOPs and temporary memory over a plain step.
CASES = {
    "mlp": (MLP(), 64, (256,), 1.03, 1.7),
    "matrix products on neighbourhoods": (CNN(10), 32, (28, 28), 1.02, 1.1),
    "convolutions": (ConvNet(), 32, (28, 28), 1.1, 2.0),
    "transformer": (Transformer(256), 16, (64,), 1.02, 1.1),
}


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("case", CASES)
def test_exact_noise_takes_the_multiplications_of_a_plain_step(case):
    net, size, shape, flops, memory = CASES[case]
    words = case == "transformer"
    x = jax.ShapeDtypeStruct((size, *shape), jnp.int32 if words else jnp.float32)
    y = jax.ShapeDtypeStruct((size, *shape) if words else (size,), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), x.dtype))

    def loss(params, batch):
        logits = nn.log_softmax(net.apply(params, batch[0]))
        return -jnp.mean(jnp.take_along_axis(logits, batch[1][..., None], axis=-1))

    def structured(params, batch):
        groups = adabatch.split_groups(batch, size)
        value, noise = value_and_grad_structured(loss)(params, groups)
        return value, noise.mean, noise.squared_norm, noise.trace

    costs = []
    for step in (jax.value_and_grad(loss), structured):
        program = jax.jit(step).lower(params, (x, y)).compile()
        temporary = program.memory_analysis().temp_size_in_bytes
        costs.append((program.cost_analysis()["flops"], temporary))
    (plain_flops, plain_memory), (our_flops, our_memory) = costs
    assert our_flops <= flops * plain_flops, our_flops / plain_flops
    assert our_memory <= memory * plain_memory, our_memory / plain_memory
