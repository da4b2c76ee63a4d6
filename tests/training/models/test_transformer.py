"""The transformer: shapes, what a position may see, dropout, and that it learns a text."""

import argparse
from functools import partial

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adabatch_jax as adabatch
from adabatch_jax.training import ArrayStream, build_model, load_dataset, load_text, masked_mean
from adabatch_jax.training.models import Transformer, classifier, losses_and_logits
from adabatch_jax.training.step import make_evaluation

LENGTH = 12
# Small enough to compile fast; the sizes of the default are tested by shape alone.
SMALL = Transformer(256, max_length=LENGTH, width=16, depth=2, heads=2)


def some_bytes(number, length=LENGTH, seed=0):
    values = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (number, length))
    return jnp.asarray(values, jnp.uint8)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(SMALL.init)(jax.random.key(0), some_bytes(1))


apply = jax.jit(SMALL.apply)


def test_the_model_has_the_shape_and_size_that_its_guide_gives():
    model = build_model("transformer", num_classes=256)
    inputs = jax.ShapeDtypeStruct((3, 64), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    logits = jax.eval_shape(model.apply, variables, inputs)
    assert logits.shape == (3, 64, 256) and logits.dtype == jnp.float32
    assert set(variables) == {"params"}, "no running statistics"
    leaves = jax.tree.leaves(variables)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    width, depth = 64, 2
    block = 4 * (width * width + width) + 2 * 4 * width * width + 4 * width + width
    norms = (2 * depth + 1) * 2 * width
    expected = (256 + 128) * width + depth * block + norms
    assert sum(leaf.size for leaf in leaves) == expected == 124_672


def test_a_logit_depends_on_the_bytes_up_to_its_own_and_on_no_later_one(variables):
    inputs = some_bytes(1)
    # Row i of the batch has another byte in place i.
    changed = jnp.repeat(inputs, LENGTH, 0) ^ (jnp.eye(LENGTH, dtype=jnp.uint8) * 129)
    before, after = apply(variables, inputs), apply(variables, changed)
    differs = np.abs(np.asarray(after - before)).max(-1)  # [changed byte, logit]
    later = np.triu(np.ones((LENGTH, LENGTH), bool))
    assert np.all(differs[~later] < 1e-6)
    assert np.all(differs[later] > 1e-4), differs[later].min()


def test_a_shorter_text_has_the_logits_of_the_beginning(variables):
    inputs = some_bytes(2)
    np.testing.assert_allclose(
        apply(variables, inputs[:, :5]), apply(variables, inputs)[:, :5], rtol=1e-4, atol=1e-5
    )


def test_the_order_of_earlier_bytes_matters(variables):
    # To the last position only: without position embeddings attention sees a set.
    inputs = some_bytes(1)
    swapped = inputs.at[0, :2].set(inputs[0, 1::-1])
    differs = np.abs(np.asarray(apply(variables, swapped) - apply(variables, inputs)))[0, -1]
    assert differs.max() > 1e-4


def test_examples_do_not_see_each_other(variables):
    inputs = some_bytes(3)
    together = apply(variables, inputs)
    for i in range(3):
        alone = apply(variables, inputs[i : i + 1])
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_integers_of_every_type_are_the_same_bytes(variables):
    inputs = some_bytes(1).at[0, 0].set(255).at[0, 1].set(0)
    as_int = apply(variables, inputs.astype(jnp.int32))
    np.testing.assert_array_equal(apply(variables, inputs), as_int)
    assert np.all(np.isfinite(as_int))


def test_every_parameter_learns(variables):
    def loss(variables):
        return jnp.mean(losses_and_logits(SMALL.apply, variables, some_bytes(2), labels)[0])

    labels = some_bytes(2, seed=1).astype(jnp.int32)
    gradient = jax.jit(jax.grad(loss))(variables)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        # A key's bias shifts all scores of a softmax alike: its gradient is 0.
        if "['key']['bias']" not in jax.tree_util.keystr(path):
            assert np.any(np.abs(leaf) > 1e-6), jax.tree_util.keystr(path)


def test_without_dropout_the_model_is_a_function_of_its_inputs(variables):
    inputs = some_bytes(2)
    np.testing.assert_array_equal(apply(variables, inputs), apply(variables, inputs))
    with_key = apply(variables, inputs, rngs={"dropout": jax.random.key(5)})
    np.testing.assert_array_equal(with_key, apply(variables, inputs))


def test_dropout_needs_a_key_and_follows_it(variables):
    model, inputs = SMALL.clone(dropout=0.5), some_bytes(2)
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        jax.eval_shape(model.apply, variables, inputs)
    apply_dropped = jax.jit(model.apply)
    one, same, other = (
        apply_dropped(variables, inputs, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(np.asarray(one - other)).max() > 1e-2
    plain = jax.jit(partial(model.apply, deterministic=True))(variables, inputs)
    np.testing.assert_allclose(plain, apply(variables, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            np.zeros((2, 4), np.float32),
            r"integers of shape \[B, L\], got float32 of shape \(2, 4\)",
        ),
        (np.zeros(4, np.uint8), r"got uint8 of shape \(4,\)"),
        (np.zeros((1, LENGTH + 1), np.uint8), "max_length=12 columns, got 13"),
    ],
)
def test_wrong_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        SMALL.init(jax.random.key(0), jnp.asarray(inputs))


@pytest.fixture(scope="module")
def text():
    return load_text(argparse.__file__, length=16)  # 100 kB of text that is on every machine


@pytest.fixture(scope="module")
def built(text):
    return classifier("transformer", text, seed=0)


def test_the_classifier_takes_text_as_it_is_stored(text, built):
    params, apply = built
    assert text.train_inputs.dtype == np.uint8
    logits = jax.eval_shape(apply, params, jnp.asarray(text.train_inputs[:2]))
    assert logits.shape == (2, 16, 256)
    assert params["positions"].shape == (16, 64), "as long as the windows"


def test_models_of_text_and_of_images_are_told_apart(text):
    digits = load_dataset("digits")
    with pytest.raises(
        ValueError, match=r"'transformer' is a model of text, but .* 'digits' holds im"
    ):
        classifier("transformer", digits, 0)
    for name in ("logistic", "mlp", "cnn", "resnet"):
        with pytest.raises(
            ValueError, match=f"'{name}' is a model of images, but .* 'text' holds te"
        ):
            classifier(name, text, 0)


@pytest.mark.slow
def test_a_few_steps_of_an_adaptive_batch_lower_the_loss_on_a_text(text, built):
    """Slow: a run of a transformer."""
    params, apply = built
    evaluate = make_evaluation(apply)
    test = jnp.asarray(text.test_inputs[:200]), jnp.asarray(text.test_labels[:200])
    before, _ = evaluate(params, *test)
    np.testing.assert_allclose(before, np.log(256), atol=0.1)  # nothing known yet
    optimizer = optax.chain(
        adabatch.adapt_batch_size(adabatch.norm_test(0.5), initial_batch_size=8, max_batch_size=32),
        optax.adam(3e-3),
    )

    def loss_fn(params, group):
        (inputs, labels), size = group
        return masked_mean(losses_and_logits(apply, params, inputs, labels)[0], size)

    value_and_grad = adabatch.value_and_grad_noise(loss_fn)

    @jax.jit
    def step(params, opt_state, batch):
        groups = batch.groups, batch.sizes
        _, noise = value_and_grad(params, groups, sizes=batch.sizes, count=batch.used)
        updates, opt_state = optimizer.update(noise.mean, opt_state, params, noise=noise)
        return optax.apply_updates(params, updates), opt_state

    stream = ArrayStream(
        (text.train_inputs, text.train_labels), micro_batch_size=4, num_groups=8, seed=0
    )
    opt_state = optimizer.init(params)
    sizes = []
    for _ in range(45):
        sizes.append(int(adabatch.get_batch_size(opt_state)))
        params, opt_state = step(params, opt_state, stream.take(sizes[-1]))
    after, _ = evaluate(params, *test)
    # The frequencies of the bytes alone, without any context, would give their entropy.
    counts = np.bincount(text.train_inputs.ravel(), minlength=256)
    share = counts[counts > 0] / counts.sum()
    entropy = -np.sum(share * np.log(share))
    assert after < entropy, (float(after), entropy)
    assert sizes[0] == 8 and sizes[-1] > 8 and stream.position == sum(sizes)
    assert step._cache_size() == 1
