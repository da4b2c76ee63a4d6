"""Spectra on the digits: against NumPy, the library's own functions, and the formulas."""

import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adabatch_jax as adabatch
from adabatch_jax.training import (
    SpectrumConfig,
    load_dataset,
    measure_spectrum,
    report_spectrum,
    save_params,
    show_spectrum,
)
from adabatch_jax.training.models import classifier, losses_and_logits
from adabatch_jax.training.spectrum import _command, _measure
from adabatch_jax.training.spectrum._batches import Batches, compile_measures
from adabatch_jax.training.spectrum._theory import noise_from_batches

EXAMPLES, SIZES, SUBSAMPLES, PROBES, STEPS = 96, (8, 40, 96), 3, 3, 24
TINY = dict(
    model="logistic",
    examples=EXAMPLES,
    batch_sizes=SIZES,
    subsamples=SUBSAMPLES,
    probes=PROBES,
    steps=STEPS,
    max_micro_batch_size=40,  # 96 examples make micro-batches of 32: the batch of 40 is filled up
)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def measured():
    """A result, the progress on the way, and the compiled functions."""
    shares, compiled = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _measure,
            "compile_measures",
            lambda *a: compiled.append(compile_measures(*a)) or compiled[0],
        )
        config = SpectrumConfig(**TINY)
        result = measure_spectrum(config, on_progress=lambda _, share: shares.append(share))
    return result, shares, compiled[0]


@pytest.fixture(scope="module")
def found(measured):
    return measured[0]


@pytest.fixture(scope="module")
def summary(found):
    return found.summary


@pytest.fixture(scope="module")
def gauss_newton():
    return measure_spectrum(SpectrumConfig(**TINY, matrix="gauss-newton")).summary


class Oracle:
    """The logistic model at its initial parameters in closed form, float64, and what is drawn."""

    def __init__(self, digits):
        params, _ = classifier("logistic", digits, 0)
        kernel, bias = (np.asarray(params["Dense_0"][k], np.float64) for k in ("kernel", "bias"))
        x = digits.train_inputs.reshape(1437, 64).astype(np.float64)
        x = np.c_[(x - x.mean()) / x.std(), np.ones(1437)]
        odds = np.exp(x @ np.vstack([kernel, bias]))
        p = odds / odds.sum(axis=1, keepdims=True)
        self._x, self._error = x, p - np.eye(10)[digits.train_labels]
        self._middle = np.einsum("ni,ij->nij", p, np.eye(10)) - np.einsum("ni,nj->nij", p, p)
        generator = np.random.Generator(np.random.Philox(0))
        self.pool = generator.permutation(1437)[:EXAMPLES]
        self.drawn = {
            size: [generator.choice(self.pool, size, replace=False) for _ in range(SUBSAMPLES)]
            for size in SIZES
        }

    def hessian(self, index):
        x, s = self._x[index], self._middle[index]
        outer = np.einsum("nf,ng->nfg", x, x).reshape(len(index), -1)
        blocks = (outer.T @ s.reshape(len(index), -1) / len(index)).reshape(65, 65, 10, 10)
        return blocks.transpose(0, 2, 1, 3).reshape(650, 650)

    def gradient(self, index):
        return (self._x[index].T @ self._error[index] / len(index)).ravel()

    def products(self, index, z):
        """H_i z of every example."""
        x, s = self._x[index], self._middle[index]
        inner = np.einsum("nij,nj->ni", s, x @ z.reshape(65, 10))
        return np.einsum("nf,ni->nfi", x, inner).reshape(len(index), -1)


@pytest.fixture(scope="module")
def oracle(digits):
    return Oracle(digits)


def mean_and_error(values):
    return np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))


def test_the_full_matrix_is_that_of_a_dense_computation(summary, oracle):
    values = np.linalg.eigvalsh(oracle.hessian(oracle.pool))
    full = summary["full"]
    assert summary["num_parameters"] == len(values) == 650
    np.testing.assert_allclose(full["largest"], values[-1], rtol=1e-4)
    assert abs(full["smallest"] - values[0]) <= full["smallest_residual"] + 1e-5
    assert full["largest_residual"] < 1e-3 * full["largest"]
    assert full["converged"]
    assert abs(full["trace"] - values.sum()) < 4 * full["trace_standard_error"]


def test_the_numbers_are_those_of_lanczos_spectrum(found, digits, oracle):
    keys = jax.random.split(jax.random.split(jax.random.key(0), 3)[0], PROBES)
    params, apply = classifier("logistic", digits, 0)

    def loss(params, inputs, labels):
        return jnp.mean(losses_and_logits(apply, params, inputs, labels)[0])

    images = digits.train_inputs[oracle.pool], digits.train_labels[oracle.pool]
    product = adabatch.curvature.hessian_vector_product(loss, params, *map(jnp.asarray, images))
    for number, key in enumerate(keys):
        direct = adabatch.curvature.lanczos_spectrum(product, params, key, num_steps=STEPS)
        seen = found.spectrum.eigenvalues[number]
        np.testing.assert_allclose(seen[-5:], direct.eigenvalues[0, -5:], rtol=1e-4)


@pytest.mark.slow
def test_batches_are_those_of_a_dense_computation(summary, oracle):
    """Slow: a dense matrix for each of many batches."""
    for row in summary["batches"]:
        drawn = oracle.drawn[row["batch_size"]]
        ends = np.array([np.linalg.eigvalsh(oracle.hessian(i))[[0, -1]] for i in drawn])
        mean, error = mean_and_error(ends[:, 1])
        assert row["largest"] == pytest.approx(mean, rel=1e-4)
        assert row["largest_standard_error"] == pytest.approx(error, rel=2e-3, abs=1e-4)
        assert row["smallest"] == pytest.approx(ends[:, 0].mean(), abs=1e-3)


def test_smaller_batches_are_sharper_and_the_largest_is_the_full_matrix(summary):
    small, large, whole = summary["batches"]
    assert [row["batch_size"] for row in summary["batches"]] == list(SIZES)
    full = summary["full"]["largest"]
    assert small["largest"] > large["largest"] > full
    assert whole["largest"] == pytest.approx(full, rel=1e-4)
    assert whole["predicted_largest"] == pytest.approx(full, rel=1e-6)


def test_batch_sharpness_is_the_curvature_along_the_gradient(summary, oracle):
    for row in summary["batches"]:
        values = []
        for index in oracle.drawn[row["batch_size"]]:
            g = oracle.gradient(index)
            values.append(g @ oracle.hessian(index) @ g / (g @ g))
        mean, error = mean_and_error(values)
        assert row["batch_sharpness"] == pytest.approx(mean, rel=1e-4)
        assert row["batch_sharpness_standard_error"] == pytest.approx(error, rel=2e-3, abs=1e-4)


def test_the_noise_is_the_variance_of_single_hessians(summary, oracle):
    """96 examples make 96 groups: nothing is lost, and ν² is exact."""
    z = np.linalg.eigh(oracle.hessian(oracle.pool))[1][:, -1]
    products = oracle.products(oracle.pool, z)
    expected = np.square(products - products.mean(axis=0)).sum() / (EXAMPLES - 1)
    np.testing.assert_allclose(summary["noise"], expected, rtol=1e-3)
    assert 0 <= summary["noise_smallest"] < summary["noise"]
    assert summary["noise_from"] == "ritz"


def test_what_is_predicted_is_what_the_formulas_say(summary):
    ends = summary["full"]["largest"], summary["full"]["smallest"]
    noise, sizes = summary["noise"], np.array(SIZES)
    top = adabatch.curvature.batch_hessian_extremes(*ends, noise, sizes, EXAMPLES)
    bottom = adabatch.curvature.batch_hessian_extremes(
        *ends, summary["noise_smallest"], sizes, EXAMPLES
    )
    assert summary["transition_batch_size"] == pytest.approx(noise / ends[0] ** 2, rel=1e-5)
    for row, high, low in zip(summary["batches"], top.largest, bottom.smallest, strict=True):
        assert row["predicted_largest"] == pytest.approx(float(high))
        assert row["predicted_smallest"] == pytest.approx(float(low))
        whole = dict(noise=noise, batch_size=row["batch_size"], dataset_size=1437)
        for name, momentum in (("max_learning_rate", 0.0), ("max_learning_rate_momentum", 0.9)):
            rate = adabatch.curvature.max_stable_learning_rate(ends[0], momentum=momentum, **whole)
            assert row[name] == pytest.approx(float(rate))


def test_the_gauss_newton_matrix_of_a_logistic_model_is_its_hessian(summary, gauss_newton):
    assert gauss_newton["full"]["largest"] == pytest.approx(summary["full"]["largest"], rel=1e-4)
    for ours, theirs in zip(gauss_newton["batches"], summary["batches"], strict=True):
        for name in ("largest", "batch_sharpness"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


@pytest.mark.slow
def test_the_noise_of_the_gauss_newton_matrix_is_fitted(gauss_newton):
    """Slow: spectra of several batch sizes."""
    sizes = adabatch.curvature.effective_batch_size(np.array(SIZES[:2]), EXAMPLES)
    extremes = np.array([row["largest"] for row in gauss_newton["batches"]])[:2]
    full = gauss_newton["full"]["largest"]
    noise = float(adabatch.curvature.gauss_newton_noise(sizes, extremes, full, num_parameters=650))
    assert noise > 0
    assert gauss_newton["noise"] == pytest.approx(noise)
    assert gauss_newton["noise_from"] == list(SIZES[:2]), "all examples have no noise"
    assert gauss_newton["transition_batch_size"] == pytest.approx(650 * noise / (full - noise))
    for row, ratio in zip(gauss_newton["batches"], 650 / sizes, strict=False):
        expected = adabatch.curvature.batch_gauss_newton_extremes(full, noise, ratio)
        assert row["predicted_largest"] == pytest.approx(float(expected.largest))
        inverse = adabatch.curvature.inverse_effective_batch_size(row["batch_size"], 1437)
        sharp = adabatch.curvature.batch_gauss_newton_extremes(full, noise, 650 * inverse).largest
        assert row["max_learning_rate"] == pytest.approx(2 / float(sharp))


@pytest.mark.parametrize(
    ("sizes", "used"),
    [
        ((4, 8), [4, 8]),
        ((4, 8, 16, 96), [4, 8, 16]),
        ((4, 8, 16, 32), [4, 16]),
        (tuple(2**k for k in range(10)), [1, 4, 64, 256]),
        ((96,), []),
    ],
)
def test_of_many_sizes_every_other_one_tests_the_fit(sizes, used):
    total = 96 if max(sizes) <= 96 else 8192
    inverse = adabatch.curvature.inverse_effective_batch_size(np.array(sizes), total)
    tops = adabatch.curvature.batch_gauss_newton_extremes(5.0, 0.5, 1000 * inverse).largest
    noise, fitted = noise_from_batches(
        sizes, tops.tolist(), 5.0, examples=total, num_parameters=1000
    )
    assert fitted == used
    assert noise == pytest.approx(0.5, rel=1e-3) if used else math.isnan(noise)


def test_progress_rises_from_nothing_to_the_end(measured):
    _, shares, _ = measured
    assert shares[0] == 0 and shares[-1] == pytest.approx(1)
    assert shares == sorted(shares)
    assert len(shares) == PROBES + 2 + len(SIZES) * SUBSAMPLES + 1


def test_one_compilation_serves_every_batch_size(measured):
    _, _, compiled = measured
    assert compiled.of_batch._cache_size() == 1
    assert compiled.noise_along._cache_size() == 1


def test_the_random_probe_sees_less_of_the_noise(summary, digits, oracle):
    params, apply = classifier("logistic", digits, 0)
    measures = compile_measures(SpectrumConfig(noise_probe="random"), apply)
    groups, _ = Batches(digits, EXAMPLES, 1).of(oracle.pool)
    assert 0 < measures.noise_along(params, groups, 1.0, jax.random.key(0)) < summary["noise"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(matrix="fisher"), "--matrix must be one of hessian, gauss-newton, got 'fisher'"),
        (dict(noise_probe="top"), "--noise-probe must be one of ritz, random"),
        (dict(dataset="cifar"), "--dataset must be one of"),
        (dict(model="vit"), "--model must be one of"),
        (dict(steps=0), "--steps must be a positive integer, got 0"),
        (dict(probes=-1), "--probes must be a positive integer"),
        (dict(subsamples=0), "--subsamples must be a positive integer"),
        (dict(max_micro_batch_size=0), "--max-micro-batch-size must be a positive integer"),
        (dict(examples=1), "--examples must be at least 2"),
        (dict(seed=-1), "--seed must lie in"),
        (dict(batch_sizes=()), "--batch-sizes needs at least one"),
        (dict(batch_sizes=(16, 0)), "--batch-sizes must be a positive integer, got 0"),
        (dict(batch_sizes=(16, 16)), "--batch-sizes 16 16 holds one twice"),
        (dict(run="runs/digits", model="mlp"), "leave out --model mlp"),
        (dict(run="runs/digits", dataset="digits"), "leave out --dataset digits"),
        (dict(data_dir="data"), "--data-dir has no meaning"),
        (dict(matrix="gauss-newton", noise_probe="random"), "leave out --noise-probe random"),
    ],
)
def test_bad_options_are_named_as_the_command_does(options, message):
    with pytest.raises(ValueError, match=r"^spectrum: ") as caught:
        SpectrumConfig(**options)
    assert message in str(caught.value)


def test_defaults_follow_the_data():
    digits = SpectrumConfig().resolved(1437)
    assert (digits.examples, digits.batch_sizes) == (1437, (16, 32, 64, 128, 256))
    large = SpectrumConfig().resolved(60_000)
    assert large.examples == 8192 and large.batch_sizes[-1] == 2048
    assert SpectrumConfig(examples=20).resolved(1437).batch_sizes == (4,)
    assert SpectrumConfig(batch_sizes=(64, 8)).resolved(1437).batch_sizes == (8, 64)
    for options in (dict(examples=2000), dict(batch_sizes=(1438,))):
        with pytest.raises(ValueError, match="exceeds the 1437"):
            SpectrumConfig(**options).resolved(1437)


def run_folder(path, params, model="logistic"):
    path.mkdir()
    config = dict(dataset="digits", model=model, data_dir=None)
    (path / "summary.json").write_text(json.dumps(dict(config=config)))
    save_params(path / "checkpoint", params)
    return path


def test_a_run_is_measured_at_its_parameters(digits, tmp_path):
    params, _ = classifier("logistic", digits, 7)
    run = run_folder(tmp_path / "run", params)
    subject = _measure.load_subject(SpectrumConfig(run=run))
    jax.tree.map(np.testing.assert_array_equal, subject.params, params)
    assert subject.source.checkpoint == run / "checkpoint"
    fresh = _measure.load_subject(SpectrumConfig(model="logistic")).params
    assert (fresh["Dense_0"]["kernel"] != params["Dense_0"]["kernel"]).any()
    with pytest.raises(ValueError, match=r"--data-dir has no meaning for --run .* a run on digits"):
        SpectrumConfig(run=run, data_dir=tmp_path).source()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not the folder of a finished run"),
        ("{", "summary.json is damaged"),
        ("[]", "summary.json is damaged"),
        ('{"config": {"dataset": "digits"}}', "summary.json is damaged"),
        (
            '{"config": {"dataset": "digits", "model": "vit", "data_dir": null}}',
            "model must be one of",
        ),
        (
            '{"config": {"dataset": "digits", "model": "mlp", "data_dir": null}}',
            "checkpoint: no checkpoint",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        _measure.load_subject(SpectrumConfig(run=tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_that_diverged_is_refused(found, digits, tmp_path, monkeypatch):
    spectrum = jax.tree.map(lambda x: x * np.nan, found.spectrum)
    monkeypatch.setattr(_measure, "_measure", lambda *_: (spectrum, {}, [1.0, 1.0]))
    with pytest.raises(ValueError, match="not finite"):
        measure_spectrum(SpectrumConfig(**TINY))


def test_what_is_written_is_strict_json_and_a_picture(found, tmp_path, monkeypatch):
    monkeypatch.setattr(_command, "measure_subject", lambda *_: found)
    report_spectrum(SpectrumConfig(**TINY, out=tmp_path))
    written = json.loads((tmp_path / "spectrum.json").read_text(), parse_constant=pytest.fail)
    assert written["batches"] == found.summary["batches"]
    assert np.shape(written["ritz_values"]) == np.shape(written["ritz_weights"]) == (PROBES, STEPS)
    assert written["config"]["batch_sizes"] == list(SIZES)
    assert {p.name for p in tmp_path.iterdir()} == {"spectrum.json", "spectrum.png"}
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_waits_for_the_step_that_is_computed(tmp_path, monkeypatch):
    steps = []

    def measure(subject, on_progress):
        on_progress("first", 0.0)
        signal.raise_signal(signal.SIGINT)
        steps.append("first")
        on_progress("second", 0.5)
        steps.append("second")

    monkeypatch.setattr(_command, "measure_subject", measure)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        report_spectrum(SpectrumConfig(**TINY, out=tmp_path))
    assert steps == ["first"]
    assert signal.getsignal(signal.SIGINT) is before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("matrix", ["hessian", "gauss-newton"])
def test_the_table_fits_a_narrow_terminal(matrix, summary, gauss_newton, tmp_path, capsys):
    shown = summary if matrix == "hessian" else gauss_newton
    show_spectrum(shown, tmp_path)
    said = capsys.readouterr().out
    assert "…" not in said, "nothing is cut off"
    starts = tuple(f"{size} " for size in SIZES)
    rows = [line.split() for line in said.splitlines() if line.strip().startswith(starts)]
    assert [int(row[0]) for row in rows] == list(SIZES)
    for row, numbers in zip(rows, shown["batches"], strict=True):
        assert float(row[1]) == pytest.approx(numbers["largest"], rel=0.01)
    assert str(tmp_path) in said


def test_numbers_that_are_not_finite_can_be_shown(summary, tmp_path, capsys):
    row = {**summary["batches"][0], "largest_standard_error": math.nan, "converged": False}
    show_spectrum({**summary, "transition_batch_size": math.inf, "batches": [row]}, tmp_path)
    said = capsys.readouterr().out
    assert "b* = ∞" in said and "nan" not in said
    assert "some batch spectra had not converged: more --steps" in said
