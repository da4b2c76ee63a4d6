"""`value_and_grad_structured` against the gradients of single examples, for all sorts of losses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

from adabatch_jax import split_groups
from adabatch_jax.noise._structured._estimate import value_and_grad_structured
from tests.marks import slow

N = 6  # examples


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def of_linen(net, x, num_classes=5):
    labels = jax.random.randint(
        jax.random.key(1), (N, *x.shape[1:2][: x.ndim == 2]), 0, num_classes
    )
    labels = labels if jnp.issubdtype(x.dtype, jnp.integer) else labels[:N].reshape(N, -1)[:, 0]

    @jax.jit
    def init(x):  # no zeros: a bias of zero would hide what is wrong about it
        noisy = lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape)
        return jax.tree.map(noisy, net.init(jax.random.key(0), x)["params"])

    params = init(x[:1])

    def loss(params, batch):
        return cross_entropy(net.apply({"params": params}, batch[0]), batch[1])

    return loss, params, (x, labels)


def drawn(**shapes):
    keys = jax.random.split(jax.random.key(5), len(shapes))
    return {k: jax.random.normal(key, s) for key, (k, s) in zip(keys, shapes.items(), strict=True)}


def images(*shape):
    return jax.random.normal(jax.random.key(3), (N, *shape))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.relu(nn.Dense(7)(x)))


class ConvNet(nn.Module):
    """Strides, padding, dilation of kernel and input, groups of channels, a transposed convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.Conv(8, (2, 3), kernel_dilation=2, padding="VALID", feature_group_count=2)(x)
        x = nn.relu(nn.GroupNorm(4)(x))
        x = nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x)
        x = nn.Conv(4, (3, 3), input_dilation=2, padding=((1, 2), (-1, 3)))(x)
        x = nn.Conv(4, (1, 1), feature_group_count=4, use_bias=False)(x)
        return nn.Dense(5)(jnp.mean(nn.relu(x), axis=(1, 2)))


class Transformer(nn.Module):
    """Attention, LayerNorm, positions, and an embedding that is used twice; rematerialised."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(5, 8)
        x = embed(ids) + self.param("positions", nn.initializers.normal(), (*ids.shape[1:], 8))
        mask = nn.make_causal_mask(ids)
        x = x + nn.remat(nn.MultiHeadDotProductAttention)(2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


class Scanned(nn.Module):
    """Layers in a scan, which goes as a whole, between layers that do not."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        body = lambda layer, carry: (nn.tanh(layer(carry)), None)
        layers = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(nn.Dense(4), x)
        return nn.Dense(5)(x)


@jax.custom_vjp
def tripled(w, x):
    return x @ w


tripled.defvjp(lambda w, x: (x @ w, (w, x)), lambda wx, d: (3.0 * wx[1].T @ d, d @ wx[0].T))


def odd(params, batch):
    """Uses without a formula, several at once, a change before the use, integers on the way."""
    x, labels = batch
    w = params["direction"] / jnp.linalg.norm(params["direction"]) * params["length"]
    x = x @ w  # weight normalisation
    q, k = jnp.split(x @ params["both"], 2, axis=-1)
    x = jnp.where(q > 0, k, params["slope"] * q) / (1.0 + params["slope"] ** 2)
    token = jnp.broadcast_to(params["token"], (1, 1))
    x = jnp.concatenate([token, x, 2.0 * token], axis=-1)
    x = tripled(params["custom"], x)
    x = jnp.maximum(x, params["floor"])  # not linear
    x = x - params["shift"] + jnp.round(params["shift"]).astype(jnp.int32)
    x = x * jax.lax.stop_gradient(params["stopped"])
    x = params["table"].T[jnp.argmax(x, axis=-1) + jnp.array([-1])] + x
    penalty = 0.1 * jnp.sum(params["both"] ** 2)
    return cross_entropy(x @ params["table"], labels) + penalty


ODD = dict(direction=(3, 6), length=(6,), both=(6, 8), slope=(4,), token=(1,), custom=(6, 4))
ODD |= dict(floor=(4,), shift=(), stopped=(4,), table=(4, 5), unused=(2,))


def embedding(params, batch):
    """Rows of large tables; one out of bounds counts as the last of one, and as none of another."""
    ids, labels = batch
    x = params["clipped"].at[7 * ids].get(mode="clip")
    x = x + params["filled"].at[7 * ids].get(mode="fill", fill_value=0.0)
    return cross_entropy(jnp.sum(x, axis=1), labels[:, 0])


def left(params, batch):
    """Parameters on the left of products, of one column and of several; a shared axis."""
    x, labels = batch  # [1, 3, 5]
    x = jnp.tanh(jnp.matmul(params["several"], jnp.swapaxes(x[0], 0, 1)))
    x = jnp.einsum("hde,dth->teh", params["heads"], x.reshape(4, 3, 2))
    x = jnp.dot(params["one"], x.reshape(-1))
    return cross_entropy(x[None], labels)


def of_nnx():
    net = nnx.Sequential(
        nnx.Linear(6, 7, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(7, 5, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(net)

    def loss(params, batch):
        return cross_entropy(nnx.merge(graph, params)(batch[0]), batch[1])

    return loss, params, (images(6), jnp.arange(N) % 5)


IDS = jax.random.randint(jax.random.key(4), (N, 4), 0, 5)
CASES = {
    "mlp": lambda: of_linen(MLP(), images(6)),
    "convolutions": lambda: of_linen(ConvNet(), images(9, 12, 2)),
    "transformer": lambda: of_linen(Transformer(), IDS),
    "embedding": lambda: (embedding, drawn(clipped=(25, 5), filled=(25, 5)), (IDS, IDS)),
    "scan": lambda: of_linen(Scanned(), images(6)),
    "left": lambda: (
        left,
        drawn(several=(8, 5), heads=(2, 4, 4), one=(5, 24)),
        (images(3, 5), jnp.arange(N) % 5),
    ),
    "odd": lambda: (odd, drawn(**ODD), (images(3), jnp.arange(N) % 5)),
    "nnx": of_nnx,
}


def reference(loss, params, batch):
    """Sums over the gradients of single examples."""
    one = jax.value_and_grad(lambda p, x: loss(p, jax.tree.map(lambda a: a[None], x)))
    found = jax.jit(jax.vmap(one, (None, 0)))(params, batch)
    values, g = jax.tree.map(np.asarray, found)
    mean = jax.tree.map(lambda a: a.mean(0), g)
    apart = jax.tree.map(lambda a, m: a - m, g, mean)
    along = sum(jax.tree.leaves(jax.tree.map(lambda a, m: (a * m).reshape(N, -1).sum(1), g, mean)))
    squares = jax.tree.map(lambda a: np.square(a).sum(0), apart)
    total = sum(np.sum(s) for s in jax.tree.leaves(squares))
    return values.mean(), mean, total, squares, np.square(along - along.mean()).sum()


def close(found, expected, rtol):
    largest = max(float(np.abs(b).max()) for b in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(float(np.abs(b).max()), 1e-2 * largest)  # a leaf can be 0 but for rounding
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=rtol, atol=rtol * scale)


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_rank_promotion("allow"):
        yield


LARGE = ("convolutions", "transformer", "odd", "left", "nnx", "scan")  # programs of many operations


@pytest.mark.parametrize("case", [*(c for c in CASES if c not in LARGE), *slow(*LARGE)])
def test_all_statistics_are_those_of_single_examples(case):
    loss, params, batch = CASES[case]()
    structured = partial(value_and_grad_structured, loss)

    @jax.jit
    def measure(params, groups):
        by_coordinate = structured(coordinate_wise=True)(params, groups)[1].coordinate_scatter
        return *structured(inner_products=True)(params, groups), by_coordinate

    value, noise, by_coordinate = measure(params, split_groups(batch, N))
    expected, mean, scatter, squares, products = reference(loss, params, batch)
    assert int(noise.num_examples) == int(noise.num_groups) == N
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    close(noise.mean, mean, 1e-5)
    np.testing.assert_allclose(noise.scatter, scatter, rtol=1e-5)
    close(by_coordinate, squares, 1e-5)
    np.testing.assert_allclose(noise.inner_product_scatter, products, rtol=1e-5)
