"""Settings for every test: JAX on the CPU and strict, Hypothesis the same on every run."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test has compiled serves the others, also those in other processes: they inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="adabatch_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Tests compile much and compute little. With =0 they meet the programs of users, as in one line of CI.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax
import pytest

# Scripts, whose doctests nobody should look for; test_scripts.py starts those in folders.
collect_ignore = ["experiments", "benchmarks", "line_coverage.py"]

jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=25
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def single_precision():
    """Tests that need float64 turn it on for themselves, and off again."""
    assert not jax.config.jax_enable_x64, "float64 is on: an earlier test, or the environment"
    yield
    assert not jax.config.jax_enable_x64, "this test left float64 on"


@pytest.fixture(autouse=True, scope="session")
def _smoother_for_tests():
    """`smoother="as they are"`: for tests of what is around the Gaussian process, which compiles long."""
    from adabatch_jax.learning_rate import _autowu
    from tests.learning_rate.losses import as_they_are

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_autowu.SMOOTHERS, "as they are", as_they_are)
        yield


@pytest.fixture(scope="module")
def optimized():
    """Programs as users get them: for tests of what they cost."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
