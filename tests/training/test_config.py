import dataclasses
import re

import pytest

from adabatch_jax.training import TrainConfig, build_criterion, build_optimizer, resolve
from adabatch_jax.training._options import choices
from adabatch_jax.training._registry import CRITERIA, OPTIMIZERS, SCHEDULES, Direction

DIRECTIONS = [name for name, entry in OPTIMIZERS.items() if isinstance(entry, Direction)]
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
        ({"theta": -1.0}, "--theta must be a positive number, got -1.0"),
        ({"nu": 0.0}, "--nu must be a positive number, got 0.0"),
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


NONE, INNER = {"criterion": "none"}, {"criterion": "inner-product"}
AVERAGED = {"smoothing": 0.9}
COULD_NOT = "--smoothing 0.9 without --debias could never enlarge the batch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            NONE | {"eta": 0.5},
            "none does not read --eta (norm and coordinate-norm do), leave out --eta 0.5",
        ),
        (INNER | {"eta": 0.5}, "leave out --eta 0.5"),
        (
            {"theta": 0.5},
            "norm does not read --theta (inner-product and augmented do), leave out --th",
        ),
        (INNER | {"nu": 4.0}, "does not read --nu (augmented does), leave out --nu 4.0"),
        (NONE | {"smoothing": 0.5}, "none makes no test, leave out --smoothing 0.5"),
        (NONE | {"growth_limit": 2.0}, "none makes no test, leave out --growth-limit 2.0"),
        (NONE | {"debias": True}, "none makes no test, leave out --debias"),
        (NONE | {"max_batch_size": 32}, "keeps the batch at 16, leave out --max-batch-size 32"),
        ({"criterion": "noise-scale", "debias": False}, "by definition, leave out --no-debias"),
        ({"patience": 9}, "one process alone waits for no other, leave out --patience 9"),
        (AVERAGED, COULD_NOT),
        (AVERAGED, "(--eta 1.0 by default): give --debias, too"),
        (AVERAGED | {"eta": 1.5}, "(--eta 1.5): give --debias, too"),
        (AVERAGED | {"debias": False}, "leave out --no-debias"),
        (AVERAGED | {"criterion": "coordinate-norm"}, "(--eta 3.0 by default)"),
        (
            {"auto": True, "debias": False},
            "0.9 (by default with --auto) without --debias could nev",
        ),
        (
            AVERAGED | {"criterion": "augmented", "theta": 1.0},
            "(--theta 1.0, --nu 5.84 by default)",
        ),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        NONE | {"max_batch_size": 16, "debias": False},
        NONE | {"initial_batch_size": 1000},
        AVERAGED | {"eta": 0.5},
        AVERAGED | {"debias": True},
        AVERAGED | INNER,
        AVERAGED | {"criterion": "noise-scale"},
        {"criterion": "noise-scale", "debias": True},
        {"smoothing": 0.0},
        {"auto": True, "debias": False, "eta": 0.5},
        BY_HAND | {"patience": 9},
    ],
)
def test_one_that_has_an_effect_or_says_what_is_the_case_is_taken(options):
    resolve(TrainConfig(**options), 60_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 8}, "--max-batch-size 8 is below the first batch, 16 by default: give"),
        ({"initial_batch_size": 600}, "600 exceeds the largest batch, 512 by default: give --max"),
        (
            {"auto": True, "max_batch_size": 8},
            "--max-batch-size 8 is below the first batch, 256 by default with --auto: give --initial",
        ),
    ],
)
def test_what_nobody_gave_is_called_a_default(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(TrainConfig(**options), 60_000)


def test_every_criterion_has_a_threshold_of_its_own():
    def thresholds(**options):
        plan = resolve(TrainConfig(**options), 60_000)
        used = plan.options.eta, plan.options.theta, plan.options.nu
        assert list(plan.thresholds.values()) == [value for value in used if value is not None]
        return used

    assert thresholds() == (1.0, None, None)
    assert thresholds(criterion="coordinate-norm") == (3.0, None, None)
    assert thresholds(criterion="coordinate-norm", auto=True) == (4.5, None, None)
    assert thresholds(criterion="inner-product") == (None, 0.9, None)
    assert thresholds(criterion="augmented", nu=2.0) == (None, 0.9, 2.0)
    assert thresholds(criterion="none") == (None, None, None)


def test_every_optimizer_has_a_rate_of_its_own():
    for name in DIRECTIONS:
        plan = resolve(TrainConfig(optimizer=name, schedule="constant"), 1437)
        assert plan.rate == plan.options.learning_rate == OPTIMIZERS[name].learning_rate


@pytest.mark.parametrize(
    ("number", "options", "first", "steps"),
    [
        (1437, {"epochs": 5}, 16, 44),
        (60_000, {"epochs": 2}, 256, 46),
        (60_000, {"epochs": 1}, 128, 46),  # 23 steps of 256 would be too few
        (1437, {"epochs": 1}, 16, 8),
        (1437, {"epochs": 10, "initial_batch_size": 720}, 720, 1),
    ],
)
def test_auto_takes_a_first_batch_that_lets_it_search_or_says_so(number, options, first, steps):
    plan = resolve(TrainConfig(auto=True, **options), number)
    assert plan.initial_batch_size == first
    assert resolve(plan.options, number) == plan
    lack = plan.lack_of_steps
    if steps >= 40:
        assert lack is None
    else:
        assert f"has {steps} steps of --initial-batch-size {first}, and it takes 40" in lack


def test_a_schedule_that_finds_its_rate_is_refused_without_the_steps_for_it():
    options = {"schedule": "autowu-improved", "epochs": 2, "initial_batch_size": 400}
    message = (
        r"train: --schedule autowu-improved: .*too short .* 1 steps of --initial-batch-size 400"
    )
    with pytest.raises(ValueError, match=message):
        resolve(TrainConfig(**options), 1437)
    too_few = TrainConfig(schedule="autowu", epochs=2)
    with pytest.raises(ValueError, match=r"autowu with --epochs 2 .*too short for one test"):
        build_optimizer(resolve(too_few, 1437))


def test_the_output_folder_follows_the_data_set():
    assert TrainConfig(dataset="mnist").output.parts == ("runs", "mnist")
    assert TrainConfig(out="elsewhere").output.parts == ("elsewhere",)


def test_every_choice_builds():
    params = {"w": 1.0}
    for name in DIRECTIONS:
        OPTIMIZERS[name].make().init(params)
    for criterion in CRITERIA:
        built = build_criterion(resolve(TrainConfig(criterion=criterion), 1000))
        assert (built is None) == (criterion == "none")
    for scaling in choices(TrainConfig)["scaling"]:
        for schedule in SCHEDULES:
            config = TrainConfig(scaling=scaling, schedule=schedule)
            build_optimizer(resolve(config, 1000)).init(params)
    for optimizer in DIRECTIONS:
        build_optimizer(resolve(TrainConfig(optimizer=optimizer, auto=True), 1000))
    build_optimizer(resolve(TrainConfig(optimizer="lanczos-sgd"), 1000)).init(params)


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
    plan = resolve(TrainConfig(**options), 60_000)
    assert (plan.initial_batch_size, plan.max_batch_size) == sizes
    assert resolve(plan.options, 60_000).options == plan.options


def test_what_is_found_is_not_filled_in():
    def used(**options):
        return resolve(TrainConfig(**options), 1437).options

    assert used().learning_rate == 0.02
    assert used(schedule="autowu").learning_rate is None
    automatic = used(auto=True)
    assert (automatic.learning_rate, automatic.schedule, automatic.scaling) == (None, None, None)
    assert (automatic.initial_batch_size, automatic.max_batch_size) == (16, 256)
    assert (automatic.eta, automatic.growth_limit) == (1.5, 1.1)
    assert (used().eta, used(auto=True, eta=3.0).eta) == (1.0, 3.0)


@pytest.mark.parametrize("options", [LANCZOS, {"scaling": "random-matrix"}])
def test_how_the_curvature_is_measured_is_filled_in(options):
    plan = resolve(TrainConfig(**options, epochs=10), 60_000)
    assert (plan.curvature_examples, plan.refresh_every) == (256, 102_400)
    short = resolve(TrainConfig(**options, epochs=4), 200)
    assert (short.curvature_examples, short.refresh_every) == (200, 266)
    assert resolve(plan.options, 60_000).options == plan.options
    given = resolve(TrainConfig(**options, curvature_examples=100, refresh_every=7), 60_000)
    assert (given.curvature_examples, given.refresh_every) == (100, 7)
    more = resolve(TrainConfig(**options, curvature_examples=100), 60)
    assert (more.curvature_examples, more.options.curvature_examples) == (60, 100)
    assert resolve(TrainConfig(**LANCZOS), 60_000).options.learning_rate is None


def test_every_option_is_documented_for_the_command():
    source = TrainConfig.__module__
    text = __import__(source, fromlist=["_"]).__loader__.get_source(source)
    lines = [line.strip() for line in text.splitlines()]
    for field in dataclasses.fields(TrainConfig):
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}: "))
        assert lines[place + 1].startswith('"""'), f"{field.name} has no help text"
