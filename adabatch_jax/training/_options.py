"""What can be chosen for a training run, and what is chosen where nothing is said."""

from __future__ import annotations

from typing import Any

from adabatch_jax.learning_rate import LEAST_WARMUP_STEPS
from adabatch_jax.optimizers import LEAST_STEPS, WARMUP

IMAGES = ("digits", "mnist", "fashion-mnist")
DATASETS = (*IMAGES, "text")
IMAGE_MODELS = ("logistic", "mlp", "cnn", "resnet")
MODELS = (*IMAGE_MODELS, "transformer")
DIRECTIONS = ("adadagrad", "adadagrad-norm", "adamw", "adam", "adamp", "sgd", "momentum", "lamb")
OPTIMIZERS = (*DIRECTIONS, "lanczos-sgd")
CRITERIA = ("norm", "coordinate-norm", "inner-product", "augmented", "noise-scale", "none")
SCALINGS = ("none", "linear", "sqrt", "random-matrix")
SCHEDULES = ("constant", "cosine", "autowu", "autowu-improved")
FINDS_ITS_RATE = ("autowu", "autowu-improved")
RESUMES = ("always", "auto", "never")
# What may change between two parts of one run.
OUTSIDE_THE_RUN = (
    *("out", "data_dir", "data_file", "checkpoint_every", "keep", "resume", "tensorboard"),
    *("devices", "distributed", "coordinator", "num_processes", "process_id", "patience"),
)

FIRST_BATCH_SIZE, LARGEST_BATCH_SIZE = 16, 512
# At the first batch size of 16, from where the rate follows with the root of the batch. Cross-entropy on a
# quarter held out of the digits' training data, after ten epochs of a batch that grows to 512, by the rate:
# MLP, in brackets logistic regression, means of two seeds. About half of the best, so that there is room.
#   adadagrad       .01: .153 (.813)   .02: .116 (.494)   .04: .105 (.324)   .08: .103 (.237)
#   adadagrad-norm   .6: .264 (.381)     1: .200 (.299)     2: .144 (.235)     4: .120 (.191)
#   adam, adamw, adamp .002: .164 (.802)  .004: .139 (.446)  .008: .119 (.284)  .016: .119 (.205)
#   sgd              .1: .202 (.373)    .2: .147 (.270)    .4: .115 (.207)    .8: .894 (.168)
#   momentum        .01: .192 (.311)   .02: .165 (.231)   .04: .124 (.196)   .08: .171 (.209)
#   lamb           .005: .180 (1.20)   .01: .160 (.519)   .02: .230 (.215)   .04: .630 (.573)
RATES = {
    "adadagrad": 0.02,
    "adadagrad-norm": 2.0,
    "adamw": 0.004,
    "adam": 0.004,
    "adamp": 0.004,
    "sgd": 0.2,
    "momentum": 0.02,
    "lamb": 0.01,
}
# The second asks for more at the same η. Ten epochs as above: norm 1: .116 after 90 steps; coordinate-norm
# 1: .151 after 29, 2: .123 after 41, 3: .123 after 60.
ETAS = {"norm": 1.0, "coordinate-norm": 3.0}
THETA, NU = 0.9, 5.84
CRITERIA_WITH = {  # thresholds that not every criterion has
    "eta": tuple(ETAS),
    "theta": ("inner-product", "augmented"),
    "nu": ("augmented",),
}
# The part of a run that may go into finding its rate, and how many steps of the first batch it takes.
WARMUPS = {
    "auto": (WARMUP, LEAST_STEPS),
    "autowu": (0.5, LEAST_WARMUP_STEPS),
    "autowu-improved": (0.2, LEAST_WARMUP_STEPS),
}


def spelled(name: str) -> str:
    """The field as the command spells it."""
    return "--" + name.replace("_", "-")


def flag(name: str, value: Any) -> dict[str, Any]:
    """The field for `_validate`, as the command spells it."""
    return {spelled(name): value}


def said(name: str, value: Any) -> str:
    """The option as it is given: --seed 3, --debias, --no-debias; --eta left out where it is None."""
    if value is None:
        return f"{spelled(name)} left out"
    if isinstance(value, bool):
        return spelled(name) if value else spelled(f"no_{name}")
    return f"{spelled(name)} {value}"
