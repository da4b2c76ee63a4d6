import dataclasses
import re

import pytest

from adabatch_jax.training import TrainConfig, build_criterion, build_optimizer
from adabatch_jax.training._config import CRITERIA, DIRECTIONS, SCALINGS, SCHEDULES
from adabatch_jax.training._optimizer import build_direction

LANCZOS = {"optimizer": "lanczos-sgd"}
BY_HAND = {"coordinator": "h:1", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset": "cifar"},
            "--dataset must be one of digits, mnist, fashion-mnist, text, got 'cifar'",
        ),
        ({"model": "vit"}, "--model must be one of"),
        ({"optimizer": "adamax"}, "--optimizer must be one of"),
        ({"criterion": "luck"}, "--criterion must be one of"),
        ({"scaling": "cubic"}, "--scaling must be one of"),
        ({"schedule": "step"}, "--schedule must be one of"),
        ({"eta": 0.0}, "--eta must be a positive number, got 0.0"),
        ({"eta": float("nan")}, "--eta must be a positive number, got nan"),
        ({"theta": -1.0}, "--theta"),
        ({"nu": 0.0}, "--nu"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"initial_batch_size": 0}, "--initial-batch-size must be a positive integer, got 0"),
        ({"initial_batch_size": 64, "max_batch_size": 32}, "64 exceeds --max-batch-size 32"),
        ({"initial_batch_size": 1}, "--initial-batch-size must be at least 2"),
        ({"max_micro_batch_size": 0}, "--max-micro-batch-size"),
        ({"noise_groups": 1}, "--noise-groups must be at least 2, got 1"),
        ({"epochs": 0}, "--epochs"),
        ({"smoothing": 1.0}, "--smoothing must lie in [0.0, 1.0)"),
        ({"growth_limit": 1.0}, "--growth-limit must exceed 1"),
        ({"seed": -1}, "--seed"),
        ({"lag": -1}, "--lag"),
        ({"refresh_every": 10}, "measure the curvature, leave out --refresh-every 10"),
        ({"curvature_examples": 9}, "measure the curvature, leave out --curvature-examples 9"),
        (LANCZOS | {"refresh_every": 0}, "--refresh-every must be a positive integer, got 0"),
        (LANCZOS | {"curvature_examples": 0}, "--curvature-examples must be a positive integer"),
        (LANCZOS | {"learning_rate": 0.1}, "lanczos-sgd finds the learning rate, leave out --lea"),
        (LANCZOS | {"scaling": "linear"}, "leave out --scaling linear"),
        (LANCZOS | {"schedule": "autowu"}, "leave out --schedule autowu"),
        (LANCZOS | {"auto": True}, "leave out --auto"),
        ({"data_dir": "here"}, "--data-dir has no meaning for --dataset digits"),
        ({"data_file": "here"}, "--data-file has no meaning for --dataset digits"),
        ({"dataset": "text", "model": "transformer"}, "--dataset text needs --data-file"),
        ({"model": "transformer"}, "--model transformer does not read --dataset digits"),
        ({"dataset": "text", "data_file": "f"}, "--model mlp does not read --dataset text"),
        ({"checkpoint_every": 0}, "--checkpoint-every must be a positive integer, got 0"),
        ({"keep": 0}, "--keep must be a positive integer, got 0"),
        ({"resume": "yes"}, "--resume must be one of always, auto, never, got 'yes'"),
        ({"devices": 0}, "--devices must be a positive integer, got 0"),
        ({"distributed": "slurm"}, "--distributed must be one of auto, got 'slurm'"),
        ({"distributed": "auto", "process_id": 0}, "leave out --process-id"),
        ({"coordinator": "h:1", "num_processes": 2}, "--coordinator needs --process-id, too"),
        ({"num_processes": 2}, "--num-processes needs --coordinator, --process-id, too"),
        (BY_HAND | {"coordinator": "h"}, "--coordinator must be HOST:PORT, got 'h'"),
        (BY_HAND | {"process_id": 2}, "--process-id must lie in [0, 2), got 2"),
        ({"patience": 0}, "--patience must be a positive integer, got 0"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        TrainConfig(**options)
    assert "\n" not in str(error.value)


def test_the_output_folder_follows_the_data_set():
    assert TrainConfig(dataset="mnist").output.parts == ("runs", "mnist")
    assert TrainConfig(out="elsewhere").output.parts == ("elsewhere",)


def test_every_choice_builds():
    params = {"w": 1.0}
    for name in DIRECTIONS:
        build_direction(name).init(params)
    for criterion in CRITERIA:
        built = build_criterion(TrainConfig(criterion=criterion).resolved(20_000))
        assert (built is None) == (criterion == "none")
    for scaling in SCALINGS:
        for schedule in SCHEDULES:
            config = TrainConfig(scaling=scaling, schedule=schedule)
            build_optimizer(config, total_examples=20_000).init(params)
    for optimizer in DIRECTIONS:
        build_optimizer(TrainConfig(optimizer=optimizer, auto=True), total_examples=20_000)
    build_optimizer(TrainConfig(optimizer="lanczos-sgd"), total_examples=20_000).init(params)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, (16, 512)),
        ({"initial_batch_size": 64, "max_batch_size": 128}, (64, 128)),
        ({"auto": True}, (256, 8192)),
        ({"auto": True, "initial_batch_size": 32}, (32, 8192)),
        ({"auto": True, "max_batch_size": 300}, (256, 300)),
    ],
)
def test_sizes_that_are_left_out_are_filled_in(options, sizes):
    config = TrainConfig(**options).resolved(60_000)
    assert (config.initial_batch_size, config.max_batch_size) == sizes
    assert config.resolved(60_000) == config


def test_what_is_found_is_not_filled_in():
    assert TrainConfig().resolved(1437).learning_rate == 0.02
    assert TrainConfig(schedule="autowu").resolved(1437).learning_rate is None
    automatic = TrainConfig(auto=True).resolved(1437)
    assert (automatic.learning_rate, automatic.schedule, automatic.scaling) == (None, None, None)
    assert (automatic.initial_batch_size, automatic.max_batch_size) == (16, 256)
    assert (automatic.eta, automatic.growth_limit) == (1.5, 1.1)
    assert (TrainConfig().resolved(1437).eta, TrainConfig(auto=True, eta=3.0).eta) == (1.0, 3.0)


@pytest.mark.parametrize("options", [LANCZOS, {"scaling": "random-matrix"}])
def test_how_the_curvature_is_measured_is_filled_in(options):
    config = TrainConfig(**options, epochs=10).resolved(60_000)
    assert (config.curvature_examples, config.refresh_every) == (256, 102_400)
    short = TrainConfig(**options, epochs=4).resolved(200)
    assert (short.curvature_examples, short.refresh_every) == (200, 266)
    assert config.resolved(60_000) == config
    given = TrainConfig(**options, curvature_examples=100, refresh_every=7).resolved(60_000)
    assert (given.curvature_examples, given.refresh_every) == (100, 7)
    assert TrainConfig(**LANCZOS).resolved(60_000).learning_rate is None


def test_every_option_is_documented_for_the_command():
    source = TrainConfig.__module__
    text = __import__(source, fromlist=["_"]).__loader__.get_source(source)
    lines = [line.strip() for line in text.splitlines()]
    for field in dataclasses.fields(TrainConfig):
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}: "))
        assert lines[place + 1].startswith('"""'), f"{field.name} has no help text"
