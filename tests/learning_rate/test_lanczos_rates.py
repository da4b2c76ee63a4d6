"""The formulas of `scale_by_lanczos`, without an optimizer."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import scale_by_lanczos
from adabatch_jax.learning_rate._lanczos_rates import LanczosRules, rates


def rules(variant, **changes):
    options = dict(num_steps=3, max_momentum=0.99, safety=1.0, ema_decay=0.5, nu_squared=None)
    return LanczosRules(
        variant, **options | dict(curvature_batch_size=None, axis_name=None) | changes
    )


def state(refreshes=1):
    """L = 4, μ = 1, median 2."""
    numbers = {"curvature_scale": 4.0, "curvature_floor": 1.0, "curvature_median": 2.0}
    start = scale_by_lanczos(refresh_every=1).init(jnp.ones(1))
    arrays = {name: jnp.float32(value) for name, value in numbers.items()}
    return start._replace(**arrays, refreshes=jnp.int32(refreshes))


@pytest.mark.parametrize(
    ("variant", "alpha", "beta"),
    [
        ("gradient_descent", 2 / 6, 0.0),
        ("heavy_ball", (2 / 3) ** 2, 1 / 9),
        ("nesterov", 1 / 4, 1 / 3),
        ("nesterov_authors", 1 / 2, 1 / 3),
    ],
)
def test_the_rates_of_each_variant(variant, alpha, beta):
    # Nesterov's bound, 2 (1 + β) / ((1 + 2β) L), is 0.4: the authors' rate is above it.
    found = rates(rules(variant), state(), {})
    np.testing.assert_allclose(found, (min(alpha, 0.4) if "_a" in variant else alpha, beta), 1e-6)


def test_caps_hold():
    alpha, beta = rates(rules("heavy_ball", max_momentum=0.05, safety=0.1), state(), {})
    np.testing.assert_allclose((alpha, beta), (0.1 * 2 * 1.05 / 4, 0.05), rtol=1e-6)


def test_before_the_curvature_is_known_the_rate_is_zero():
    assert float(rates(rules("nesterov"), state(refreshes=0), {})[0]) == 0.0
