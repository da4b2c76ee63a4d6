"""The loop on the embedded digits: what it writes, and that the numbers hold together."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import (
    AutowuPhase,
    BatchSizeStatus,
    WarmupEnd,
    metrics,
    random_matrix_scaling,
)
from adabatch_jax.learning_rate import _autowu, _autowu_step
from adabatch_jax.training import (
    TrainConfig,
    TrainingError,
    _loop,
    build_criterion,
    build_model,
    build_optimizer,
    load_dataset,
    make_step,
    resolve,
    run_steps,
    train,
)
from adabatch_jax.training.models import _classifier
from adabatch_jax.training.record import RowReader
from adabatch_jax.training.step import CompiledSteps, _compile_ahead
from tests.learning_rate.losses import as_they_are
from tests.marks import slow

QUICK = {"model": "logistic", "epochs": 1, "max_batch_size": 64}  # few rungs, that compile at once


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return train(TrainConfig(epochs=8, out=out)), out


def test_the_default_run_learns_while_its_batch_grows(finished):
    result, _ = finished
    assert result.summary["test_accuracy"] >= 0.95
    assert result.summary["final_batch_size"] >= 8 * result.summary["initial_batch_size"]


def test_the_budget_is_met_exactly_and_the_gradient_compiled_once_per_rung(finished):
    result, _ = finished
    columns = result.columns
    assert columns["examples"][-1] == 8 * 1437 == result.summary["examples"]
    used = np.diff(columns["examples"], prepend=0)
    np.testing.assert_array_equal(used, columns["batch_size"])
    assert result.summary["final_batch_size"] == used.max()
    rungs = len(set(columns["micro_batch_size"]))
    assert rungs > 1
    assert result.summary["train_step_compilations"] == rungs + 1  # and the update once
    assert 0 < result.summary["seconds_waited_for_compilations"] < result.summary["seconds"]


def test_the_next_rung_is_compiled_before_a_batch_needs_it(digits, monkeypatch):
    """A step of a new rung finds it begun, and the batch sizes do not hang on when it is ready."""
    began, entered = [], []
    prepare, call = CompiledSteps.prepare, CompiledSteps.__call__

    def noted_prepare(self, rung, *arguments):
        if rung not in self:
            began.append(rung)
        prepare(self, rung, *arguments)

    def noted_call(self, rung, *arguments):
        if not entered or entered[-1] != rung:
            assert not entered or rung in self, "its compilation should be under way"
            entered.append(rung)
        return call(self, rung, *arguments)

    monkeypatch.setattr(CompiledSteps, "prepare", noted_prepare)
    monkeypatch.setattr(CompiledSteps, "__call__", noted_call)
    config = TrainConfig(model="logistic", epochs=3, growth_limit=1.5, max_batch_size=100)
    run_steps(config, digits, lambda row: None)
    assert began[: len(entered)] == entered and len(entered) >= 2
    assert len(began) <= len(entered) + 1, "one rung ahead, no more"


def test_a_rung_that_fails_to_compile_says_why(digits, monkeypatch):
    def fail(lowered):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(_compile_ahead, "_compile", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_steps(TrainConfig(model="logistic", epochs=1), digits, lambda row: None)


def test_the_criterion_applied_to_the_columns_gives_every_batch_size(finished):
    result, _ = finished
    plan, columns = resolve(TrainConfig(), 1437), result.columns
    criterion = build_criterion(plan)
    batch_size = plan.initial_batch_size
    left = columns["examples"][-1] - columns["examples"] + columns["batch_size"]
    for i, used in enumerate(columns["batch_size"]):
        assert used == min(batch_size, left[i])
        numerator, denominator = columns["noise_numerator"][i], columns["noise_denominator"][i]
        if np.isnan(numerator):
            assert batch_size == plan.max_batch_size
            assert columns["test_status"][i] == BatchSizeStatus.AT_MAXIMUM
            continue
        required = criterion.required(jnp.float32(numerator), jnp.float32(denominator))
        assert float(required) == columns["required_batch_size"][i]
        batch_size = min(int(np.ceil(max(float(required), batch_size))), plan.max_batch_size)
        assert batch_size == columns["next_batch_size"][i]


@pytest.fixture(scope="module")
def automatic(tmp_path_factory):
    out = tmp_path_factory.mktemp("automatic")
    config = TrainConfig(auto=True, optimizer="adam", epochs=12, max_batch_size=64, out=out)
    return train(config), out


@pytest.mark.slow
def test_an_automatic_run_finds_its_rate_and_then_grows_its_batch(automatic):
    """Slow: a whole run with a Gaussian process in its step."""
    result, _ = automatic
    columns, warmup = result.columns, result.summary["warmup"]
    assert result.summary["test_accuracy"] >= 0.96
    rising = columns["phase"] == AutowuPhase.WARMUP
    assert (columns["batch_size"][rising] == 16).all()
    assert result.summary["final_batch_size"] == 64  # the largest allowed
    assert columns["examples"][rising][-1] == warmup["examples"] <= 0.1 * 12 * 1437
    assert warmup["ended"] in ("MINIMUM_PASSED", "DIVERGED")
    assert 1e-3 < warmup["peak_learning_rate"] < 0.2
    first, last = columns["learning_rate"][[0, -1]]
    assert first == np.float32(1e-5) and last < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("steps_per_call", "traces"), [(1, 1), (8, 2)])
def test_one_program_holds_the_gaussian_process(digits, monkeypatch, steps_per_call, traces):
    """The update's; or the first loop on the device, which traces its step twice, for the shapes.

    Slow: whole runs with a Gaussian process in their step.
    """
    traced, plain = [], _autowu_step.decide
    monkeypatch.setattr(_autowu_step, "decide", lambda *given: traced.append(1) or plain(*given))
    options = dict(model="logistic", epochs=5, max_batch_size=64, steps_per_call=steps_per_call)
    config = TrainConfig(auto=True, **options)
    assert run_steps(config, digits, lambda row: None).compilations > 2
    assert len(traced) == traces


@pytest.mark.slow
def test_its_picture_and_summary_are_written(automatic):
    """Slow: the same run."""
    result, out = automatic
    assert json.loads((out / "summary.json").read_text()) == result.summary
    assert (out / "run.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["autowu", "autowu-improved"])
def test_a_schedule_that_finds_its_rate_drives_a_run(digits, schedule):
    """Slow: whole runs with a Gaussian process in their step."""
    rows = []
    config = TrainConfig(
        schedule=schedule, optimizer="adam", model="logistic", epochs=4, criterion="none"
    )
    run_steps(config, digits, rows.append)
    rates = np.array([row["learning_rate"] for row in rows])
    assert rates[0] == np.float32(1e-5) and rates.max() > 1e-3
    assert rows[-1]["phase"] == AutowuPhase.DECAY


CURVATURE = {"model": "logistic", "epochs": 2, "max_batch_size": 64, "curvature_examples": 67}


@pytest.mark.parametrize("schedule", ["cosine", *slow("constant")])
def test_the_learner_drives_a_run(digits, tmp_path, schedule):
    """Its rate is that of gradient descent on the curvature, times the schedule."""
    config = TrainConfig(
        **CURVATURE, optimizer="lanczos-sgd", schedule=schedule, refresh_every=600, out=tmp_path
    )
    result = train(config)
    columns, found = result.columns, result.summary["curvature"]
    assert result.summary["test_accuracy"] > 0.85
    assert (
        found["refreshes"] == columns["refreshes"][-1] == 5
    )  # at 0, then after 600 to 664, four times
    assert found["failed_refreshes"] == 0
    rate, momentum, top = (columns[k] for k in ("learning_rate", "momentum", "curvature_largest"))
    assert 0 < momentum[-1] == np.float32(found["momentum"]) <= 0.9
    assert (rate > 0).all() and len(set(top)) == 5
    assert rate[0] <= 2 * (1 + momentum[0]) / top[0]
    if schedule == "cosine":
        assert rate[-1] < 0.02 * rate[0]


@pytest.mark.slow
def test_a_scaling_that_is_measured_drives_a_run(digits, tmp_path):
    """Every factor of the learning rate is the rule's, at the transition that the row shows.

    Slow: a whole run that measures the curvature again and again.
    """
    config = TrainConfig(
        **CURVATURE,
        optimizer="momentum",
        scaling="random-matrix",
        schedule="constant",
        refresh_every=143,
        out=tmp_path,
    )
    result = train(config)
    columns, found = result.columns, result.summary["curvature"]
    assert found["refreshes"] == columns["refreshes"][-1] > 10
    last = columns["transition_batch_size"][-1]
    assert last == pytest.approx(found["transition_batch_size"], rel=1e-5)
    assert columns["batch_size"].max() == 64
    for i, used in enumerate(np.diff(columns["examples"], prepend=0)):
        transition = jnp.float32(columns["transition_batch_size"][i])
        rule = random_matrix_scaling(transition, adaptive=False, dataset_size=1437)
        factor = float(rule(float(used), 16.0))
        assert columns["learning_rate"][i] == pytest.approx(0.02 * factor, rel=1e-4)


def test_the_folder_holds_metrics_summary_picture_and_checkpoint(finished):
    result, out = finished
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint",
        "metrics.csv",
        "run.png",
        "summary.json",
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert summary == result.summary
    assert summary["config"]["epochs"] == 8
    assert (out / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_a_seed_fixes_the_run(digits):
    runs = []
    for _ in range(2):
        rows = []
        run_steps(TrainConfig(**QUICK, seed=3), digits, rows.append)
        runs.append([(r["batch_size"], float(r["loss"])) for r in rows])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "criterion", ["coordinate-norm", *slow("noise-scale", "inner-product", "augmented")]
)
def test_every_criterion_drives_a_run(digits, criterion):
    rows = []
    config = TrainConfig(**QUICK, criterion=criterion, smoothing=0.5, debias=True)
    run_steps(config, digits, rows.append)
    assert rows[-1]["examples"] == 1437
    tested = [r for r in rows if r["test_status"] in (1, 2)]
    assert tested and all(np.isfinite(r["noise_numerator"]) for r in tested)


def test_a_healthy_run_gives_jax_debug_nans_nothing_to_stop_at(digits):
    """What is not measured, before the first test or at the largest batch, is not NaN on the device."""
    rows = []
    with jax.debug_nans(True):
        run_steps(TrainConfig(model="logistic", epochs=1, max_batch_size=24), digits, rows.append)
    assert rows[-1]["test_status"] == BatchSizeStatus.AT_MAXIMUM


def test_without_a_criterion_the_batch_stays(digits):
    rows = []
    run_steps(TrainConfig(model="logistic", criterion="none", epochs=1), digits, rows.append)
    assert [r["batch_size"] for r in rows] == 89 * [16] + [1437 - 89 * 16]


def test_a_lag_uses_the_size_decided_that_many_steps_before(digits):
    rows = []
    run_steps(TrainConfig(**QUICK | {"epochs": 2}, lag=2), digits, rows.append)
    decided = [r["next_batch_size"] for r in rows]
    used = [r["batch_size"] for r in rows]
    assert used[:3] == [16, 16, 16]
    assert used[3:-1] == decided[:-4]
    assert used[-1] <= decided[-4], "what is left"
    assert len(set(used)) > 2


def spoiled(digits, monkeypatch, examples):
    """The digits with examples that are NaN, past the check of the data."""
    inputs = digits.train_inputs.copy()
    inputs[examples] = np.nan
    monkeypatch.setattr(_classifier, "_mean_and_deviation", lambda inputs: (0.0, 1.0))
    monkeypatch.setattr(_loop, "check_dataset", lambda dataset: None)
    return digits._replace(train_inputs=inputs)


def test_a_run_that_never_learns_stops_and_does_not_blame_the_learning_rate(digits, monkeypatch):
    rows = []
    config, data = (
        TrainConfig(model="logistic", epochs=5),
        spoiled(digits, monkeypatch, slice(None)),
    )
    with pytest.raises(TrainingError, match=r"10 steps in a row .*not the learning rate"):
        run_steps(config, data, rows.append)
    assert len(rows) == 10
    assert all(r["batch_size"] == 16 for r in rows)


@pytest.mark.parametrize(
    ("schedule", "hint"),
    [("cosine", "Try a smaller learning rate"), ("autowu", "Try --schedule autowu-improved")],
)
def test_a_run_that_diverges_names_what_to_try(schedule, hint):
    reader = RowReader([].append, 0, resolve(TrainConfig(schedule=schedule), 1437).hint)
    report = {"loss": np.nan, "skipped": True, "next_batch_size": 16, "test_status": 0}
    for step in range(3, 12):
        reader({"step": step}, report, 0.0)
    with pytest.raises(TrainingError, match=hint):
        reader({"step": 12}, report, 0.0)


def test_labels_out_of_range_are_named_before_anything_is_trained(digits):
    wrong = digits._replace(train_labels=digits.train_labels + 1)
    with pytest.raises(ValueError, match=r"label 10 of example .* is out of range"):
        run_steps(TrainConfig(), wrong, lambda row: pytest.fail("a step was made"))


def test_one_bad_example_costs_its_batch_and_nothing_else(digits, monkeypatch):
    """Its row shows nothing of the step before, and the schedule goes on over its examples."""
    rows = []
    config = TrainConfig(epochs=1, scaling="none")
    done = run_steps(config, spoiled(digits, monkeypatch, [5]), rows.append)
    (bad,) = [i for i, row in enumerate(rows) if row["skipped"]]
    assert rows[bad - 1]["test_status"] == BatchSizeStatus.PASSED, "there is something to show"
    assert {k for k, v in rows[bad].items() if np.isnan(v)} == {
        *("loss", "noise_numerator", "noise_denominator", "degrees_of_freedom"),
        *("required_batch_size", "test_status", "noise_scale", "learning_rate"),
    }
    assert rows[bad]["next_batch_size"] == rows[bad - 1]["next_batch_size"]
    good = rows[:bad] + rows[bad + 1 :]
    assert all(np.isfinite(row["loss"]) for row in good)
    for row in good:
        before = (row["examples"] - row["batch_size"]) / 1437
        rate = 0.02 * 0.5 * (1 + np.cos(np.pi * before))
        assert row["learning_rate"] == pytest.approx(rate, rel=2e-3)
    assert metrics(done.opt_state)["num_examples"] == 1437


@pytest.mark.parametrize("steps_per_call", slow(1, 50))
def test_what_is_made_for_a_step_does_not_grow_with_a_size_out_of_reach(
    digits, monkeypatch, steps_per_call
):
    """The decisions are the same; batches, and the window of the order, hold what the run can use."""
    prepare, sizes = CompiledSteps.prepare, []

    def noted(self, rung, params, opt_state, data, *arguments):
        sizes.append(max(x.size for x in jax.tree.leaves(arguments)))
        prepare(self, rung, params, opt_state, data, *arguments)

    monkeypatch.setattr(CompiledSteps, "prepare", noted)
    decided = []
    for largest in (2000, 2**30):
        options = dict(model="logistic", epochs=1, eta=0.01, steps_per_call=steps_per_call)
        rows = []
        run_steps(TrainConfig(**options, max_batch_size=largest), digits, rows.append)
        decided.append([(row["batch_size"], row["micro_batch_size"]) for row in rows])
    assert rows[-1]["next_batch_size"] > 10_000, "out of reach"
    assert decided[0] == decided[1]
    assert 1437 <= max(sizes) <= 2 * 1437


def test_a_step_back_is_made_whatever_the_loss_is(digits, monkeypatch):
    """The loss is NaN from one step on, which is skipped; at the next AutoWU's snapshot is restored."""
    monkeypatch.setitem(_autowu.SMOOTHERS, "quasisep", as_they_are)
    model = build_model("logistic", 10)
    inputs, labels = (jnp.asarray(v[:64]) for v in (digits.train_inputs, digits.train_labels))
    params = model.init(jax.random.key(0), inputs[:1])["params"]
    config = TrainConfig(schedule="autowu-improved", optimizer="adam", criterion="none")
    optimizer = build_optimizer(resolve(config, 1437))
    state = optimizer.init(params)
    step = jax.jit(make_step(lambda p, x: model.apply({"params": p}, x), optimizer))
    indices = jnp.arange(16, dtype=jnp.int32).reshape(8, 2)
    sizes, count = jnp.full((8,), 2, jnp.int32), jnp.int32(8)
    for _ in range(30):
        params, state, report = step(params, state, (inputs, labels), indices, sizes, count)
    assert report["phase"] == AutowuPhase.WARMUP and report["snapshots_taken"] > 0
    broken = jnp.full_like(inputs, jnp.nan), labels
    params, state, report = step(params, state, broken, indices, sizes, count)
    assert report["skipped"] and report["warmup_end"] == WarmupEnd.RUNNING
    params, state, report = step(params, state, broken, indices, sizes, count)
    assert not report["skipped"] and report["returns_made"] == 1
    assert report["warmup_end"] == WarmupEnd.DIVERGED
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state.snapshot_params)))
    _, _, report = step(params, state, (inputs, labels), indices, sizes, count)
    assert np.isfinite(report["loss"]) and not report["skipped"]


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("here already")
    with pytest.raises(OSError, match=r"--out .* cannot be written"):
        train(TrainConfig(out=blocked / "below"))
