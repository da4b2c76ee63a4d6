"""The loop on the embedded digits: what it writes, and that the numbers hold together."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax import BatchSizeStatus
from adabatch_jax.training import (
    TrainConfig,
    TrainingError,
    build_criterion,
    build_model,
    load_dataset,
    make_step,
    run_steps,
    train,
)
from adabatch_jax.training import _loop as loop


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


def test_the_budget_is_met_exactly_and_the_step_compiled_once_per_rung(finished):
    result, _ = finished
    columns = result.columns
    assert columns["examples"][-1] == 8 * 1437 == result.summary["examples"]
    used = np.diff(columns["examples"], prepend=0)
    assert (used[:-1] == columns["batch_size"][:-1]).all()
    assert used[-1] <= columns["batch_size"][-1]
    rungs = len(set(columns["micro_batch_size"]))
    assert result.summary["train_step_compilations"] == rungs > 1


def test_the_criterion_applied_to_the_columns_gives_every_batch_size(finished):
    result, _ = finished
    config, columns = TrainConfig().resolved(1437), result.columns
    criterion = build_criterion(config)
    batch_size = config.initial_batch_size
    for i, used in enumerate(columns["batch_size"]):
        assert used == batch_size
        numerator, denominator = columns["noise_numerator"][i], columns["noise_denominator"][i]
        if np.isnan(numerator):
            assert batch_size == config.max_batch_size
            assert columns["test_status"][i] == BatchSizeStatus.AT_MAXIMUM
            continue
        required = criterion.required(jnp.float32(numerator), jnp.float32(denominator))
        assert float(required) == columns["required_batch_size"][i]
        batch_size = min(int(np.ceil(max(float(required), batch_size))), config.max_batch_size)
        assert batch_size == columns["next_batch_size"][i]


def test_the_folder_holds_metrics_summary_and_picture(finished):
    result, out = finished
    assert sorted(p.name for p in out.iterdir()) == ["metrics.csv", "run.png", "summary.json"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary == result.summary
    assert summary["config"]["epochs"] == 8
    assert (out / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_a_seed_fixes_the_run(digits):
    runs = []
    for _ in range(2):
        rows = []
        run_steps(TrainConfig(epochs=1, seed=3), digits, rows.append)
        runs.append([(r["batch_size"], float(r["loss"])) for r in rows])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "criterion", ["coordinate-norm", "inner-product", "augmented", "noise-scale"]
)
def test_every_criterion_drives_a_run(digits, criterion):
    rows = []
    config = TrainConfig(criterion=criterion, epochs=1, smoothing=0.5, debias=True)
    run_steps(config, digits, rows.append)
    assert rows[-1]["examples"] == 1437
    tested = [r for r in rows if r["test_status"] in (1, 2)]
    assert tested and all(np.isfinite(r["noise_numerator"]) for r in tested)


def test_without_a_criterion_the_batch_stays(digits):
    rows = []
    run_steps(TrainConfig(criterion="none", epochs=1), digits, rows.append)
    assert {r["batch_size"] for r in rows} == {16}


def test_a_lag_uses_the_size_decided_that_many_steps_before(digits):
    rows = []
    run_steps(TrainConfig(epochs=2, lag=2), digits, rows.append)
    decided = [r["next_batch_size"] for r in rows]
    used = [r["batch_size"] for r in rows]
    assert used[:3] == [16, 16, 16]
    assert used[3:] == decided[:-3]
    assert len(set(used)) > 2


def test_a_run_that_diverges_stops_with_a_message(digits, monkeypatch):
    spoiled = digits._replace(train_inputs=np.full_like(digits.train_inputs, np.nan))
    monkeypatch.setattr(loop, "_mean_and_deviation", lambda inputs: (0.0, 1.0))
    rows = []
    with pytest.raises(TrainingError, match="10 steps in a row"):
        run_steps(TrainConfig(epochs=5), spoiled, rows.append)
    assert len(rows) == 10
    assert all(r["batch_size"] == 16 for r in rows)


def test_one_bad_example_costs_its_batch_and_nothing_else(digits, monkeypatch):
    inputs = digits.train_inputs.copy()
    inputs[5] = np.nan
    monkeypatch.setattr(loop, "_mean_and_deviation", lambda inputs: (0.0, 1.0))
    rows = []
    run_steps(TrainConfig(epochs=1), digits._replace(train_inputs=inputs), rows.append)
    (bad,) = [i for i, row in enumerate(rows) if row["skipped"]]
    assert np.isnan(rows[bad]["required_batch_size"]), "no evidence of another step"
    assert rows[bad]["next_batch_size"] == rows[bad]["batch_size"]
    assert all(np.isfinite(row["loss"]) for row in rows[:bad] + rows[bad + 1 :])


def test_a_step_that_is_not_finite_changes_nothing(digits):
    from adabatch_jax.training._optimizer import build_optimizer

    model = build_model("logistic", 10)
    inputs = jnp.asarray(digits.train_inputs[:32]).at[5].set(jnp.nan)
    params = model.init(jax.random.key(0), inputs[:1])["params"]
    optimizer = build_optimizer(TrainConfig(), 100)
    state = optimizer.init(params)
    step = make_step(lambda p, x: model.apply({"params": p}, x), optimizer)
    data = (inputs, jnp.asarray(digits.train_labels[:32]))
    indices = jnp.arange(32, dtype=jnp.int32).reshape(8, 4)
    new_params, new_state, report = jax.jit(step)(
        params, state, data, indices, jnp.full((8,), 4, jnp.int32), jnp.int32(8)
    )
    assert bool(report["skipped"])
    jax.tree.map(np.testing.assert_array_equal, (new_params, new_state), (params, state))


def test_an_output_that_cannot_be_written_is_refused_before_training(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("here already")
    with pytest.raises(OSError, match=r"--out .* cannot be written"):
        train(TrainConfig(out=blocked / "below"))
