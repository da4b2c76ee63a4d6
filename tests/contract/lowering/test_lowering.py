"""Every transformation and the train step in a program for TPU and CUDA, exported from the CPU."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from adabatch_jax.training import TrainConfig, build_optimizer, make_step, resolve
from tests.marks import slow

# Rows whose programs hold products of ours; the reader would find them there.
HAVE_PRODUCTS = {
    "scale_by_autowu with the paper's Gaussian process",
    "scale_by_autowu by examples",
    "scale_by_improved_autowu",
    "return_to_minimum",
    "automatic",
    "scale_by_lanczos",
    "scale_by_lanczos by examples",
    "scale_by_random_matrix",
    "scale_by_random_matrix by examples",
}
# Programs with the smoother of all losses, which computes in float64 on purpose.
IN_FLOAT64 = {"scale_by_autowu by examples", "autowu-improved", "auto"}
CLASSES, EXAMPLES = 4, 1000
GROUPS, GROUP = 8, 7  # groups in a batch, examples in a group
STEPS = {
    "adadagrad": dict(optimizer="adadagrad"),
    "adadagrad-norm": dict(optimizer="adadagrad-norm", criterion="none"),
    "adam": dict(optimizer="adam", criterion="noise-scale", smoothing=0.9, debias=True),
    "adamp": dict(optimizer="adamp", scaling="linear"),
    "lamb": dict(optimizer="lamb", schedule="constant"),
    "inner products": dict(optimizer="momentum", criterion="augmented"),
    "coordinates": dict(optimizer="adamw", criterion="coordinate-norm"),
    "autowu": dict(optimizer="sgd", schedule="autowu"),
    "autowu-improved": dict(optimizer="momentum", schedule="autowu-improved"),
    "lanczos-sgd": dict(optimizer="lanczos-sgd"),
    "random-matrix": dict(optimizer="adam", scaling="random-matrix"),
    "auto": dict(optimizer="adam", auto=True),
}
# The others make the same step of links that are rows of the table.
QUICK = ["adam", "inner products", "coordinates", "lanczos-sgd", "auto"]


def update_of(row, params):
    """One update of a row, and what it is given."""
    link, params = row.make(), jax.tree.map(jnp.asarray, params)
    gradient, extra_args = row.steps(params, count=1)[0]

    def update(gradient, state, params, extra_args):
        return link.update(gradient, state, params, **extra_args)

    return update, gradient, link.init(params), params, extra_args


def apply(params, inputs):
    """Logits without a product of matrices."""
    return inputs * params["scale"][None] + params["shift"][None]


def step_of(apply, params, **options):
    """The fused step of a configuration, and what it is given."""
    plan = resolve(TrainConfig(**options), EXAMPLES)
    optimizer, test = build_optimizer(plan), plan.criterion
    rows = np.arange(GROUPS * GROUP, dtype=np.int32).reshape(GROUPS, GROUP)
    step = make_step(
        apply,
        optimizer,
        coordinate_wise=test is not None and test.coordinate_wise,
        inner_products=test is not None and test.inner_products,
        curvature=rows if plan.curvature_examples else None,
    )
    data = np.ones((EXAMPLES, CLASSES), np.float32), np.zeros(EXAMPLES, np.int32)
    sizes, count = np.full(GROUPS, GROUP, np.int32), np.int32(6)
    return step, params, optimizer.init(params), data, rows, sizes, count


def test_every_transformation_is_exported(check, row, params):
    # Optax's Adam, in one row, computes with its step count in float64 where it can.
    in_float64 = row.name in IN_FLOAT64
    products = check(*update_of(row, params), scalars=not row.promotes, float64=in_float64)
    assert bool(products) == (row.name in HAVE_PRODUCTS)
    assert any("f64>" in product for product in products) == in_float64


@pytest.mark.parametrize("name", [*QUICK, *slow(*(x for x in STEPS if x not in QUICK))])
def test_the_train_step_is_exported(check, name):
    optaxs_adam = STEPS[name]["optimizer"] in ("adam", "adamw", "lamb")
    params = {"scale": jnp.ones(CLASSES), "shift": jnp.zeros(CLASSES)}
    in_float64 = name in IN_FLOAT64
    step = step_of(apply, params, **STEPS[name])
    products = check(*step, scalars=not optaxs_adam, float64=in_float64)
    assert any("f64>" in product for product in products) == in_float64


@pytest.mark.parametrize(
    ("name", "default"),
    [("random-matrix", "high"), ("lanczos-sgd", None), *slow(("autowu-improved", "high"))],
)
def test_the_model_keeps_its_own_precision(reader, name, default):
    """Its products, and no others, have the examples of a group, or of the curvature, along an axis."""

    def model(params, inputs):
        return (inputs @ params["in"]) @ params["out"]

    def is_of_model(product):
        axes = set(re.findall(r"\d+(?=x)", product.rsplit(" : ", 1)[1]))
        return bool(axes & {str(GROUP), str(GROUPS * GROUP)})

    params = {"in": jnp.ones((CLASSES, 3)), "out": jnp.ones((3, CLASSES))}
    with jax.default_matmul_precision(default):
        text = reader.text_of(*step_of(model, params, **STEPS[name]), platforms=["tpu"])
    exact, others = set(), set()
    for product in reader.products(text):
        (others if is_of_model(product) else exact).add(product)
    assert exact and all(map(reader.is_exact, exact))
    assert others and all(("[HIGH, HIGH]" in x) == (default == "high") for x in others)
    assert not any(map(reader.is_exact, others))


# The reader finds what it looks for.

X = np.ones((3, 3), np.float32)


def kinds(findings):
    return {line.split(":")[0] for line in findings}


def found(reader, function, platforms=("tpu", "cuda"), **options):
    """What it finds in a program, by kind."""
    return kinds(reader.findings(reader.text_of(function, X, platforms=platforms), **options))


def with_io_callback(x):
    return io_callback(lambda x: x, x, x)


def with_pure_callback(x):
    return jax.pure_callback(lambda x: x, x, x)


def with_print(x):
    jax.debug.print("{}", x)
    return x


@pytest.mark.parametrize("function", [with_io_callback, with_pure_callback, with_print])
def test_a_host_callback_is_found(reader, function):
    """On the platform that runs the tests; for another one JAX refuses to lower it."""
    lowered = jax.jit(function).lower(X).as_text()
    assert kinds(reader.findings(lowered)) == {"call"}
    for platform in ("tpu", "cuda"):
        with pytest.raises(ValueError, match="different from the lowering platform"):
            found(reader, function, [platform])


@pytest.mark.parametrize("operation", ["infeed", "outfeed", "send", "recv"])
def test_a_transfer_is_found(reader, operation):
    line = f'%1 = "stablehlo.{operation}"(%0) : (!stablehlo.token) -> !stablehlo.token'
    assert kinds(reader.findings(line)) == {"host"}


def test_float64_is_found(reader):
    def literal(x):
        return jnp.where(x > 0, x, 0.0)

    with jax.enable_x64(True):
        for double in (lambda x: x * np.ones((3, 3)), lambda x: x * np.float64(2.0)):
            assert found(reader, double, x64=True) == {"float64"}
        assert found(reader, literal, x64=True) == set()
        assert found(reader, literal) == {"float64"}
        number = lambda x: x + jnp.sin(2.0)
        assert found(reader, number, x64=True) == {"float64"}
        assert found(reader, number, x64=True, scalars=False) == set()


def test_of_float64_that_is_meant_only_the_bits_are_found(reader):
    def product(x, precision="highest"):
        return jnp.matmul(*[x.astype(jnp.float64)] * 2, precision=precision)

    def bits(x):
        return jax.lax.bitcast_convert_type(x.astype(jnp.float64), jnp.int64)

    with jax.enable_x64(True):
        assert found(reader, product) == {"float64"}
        assert found(reader, product, float64=True) == set()
        assert found(reader, lambda x: product(x, None), float64=True) == {"product"}
        assert found(reader, bits, float64=True) == {"float64"}


@pytest.mark.parametrize("precision", [None, "high", ("highest", "default"), "highest"])
def test_a_product_below_the_highest_precision_is_found(reader, precision):
    expected = set() if precision == "highest" else {"product"}
    assert found(reader, lambda x: jnp.matmul(x, x, precision=precision)) == expected
    images = lambda x: jnp.convolve(x[0], x[1], precision=precision)
    assert found(reader, images) == {"product"}


def test_a_product_of_less_than_float32_is_found(reader):
    def halved(x):
        return jnp.matmul(*[x.astype(jnp.bfloat16)] * 2, precision="highest")

    assert found(reader, halved) == {"product"}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_only_known_libraries_may_be_called(reader, platform):
    triangular = jax.lax.linalg.triangular_solve
    for known in (jnp.linalg.eigh, jnp.linalg.cholesky, lambda x: triangular(x, x)):
        assert found(reader, known, [platform]) == set()
    assert found(reader, jnp.linalg.qr, [platform]) == {"call"}


def test_a_shape_that_is_not_known_is_found(reader):
    (length,) = jax.export.symbolic_shape("n")
    anything = jax.ShapeDtypeStruct((length,), jnp.float32)
    assert "shape" in kinds(reader.findings(reader.text_of(lambda x: x + 1, anything)))
