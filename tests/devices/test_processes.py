"""Two processes with four devices each are one run: as one process with eight, or with one."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from adabatch_jax.training import load_dataset, load_params, read_metrics
from adabatch_jax.training.models import classifier

pytestmark = pytest.mark.devices

OPTIONS = ["--model", "logistic", "--optimizer", "adam", "--learning-rate", "0.02", "--epochs", "3"]
OPTIONS += ["--max-batch-size", "512"]
DEATH_IS_NOTICED = 10  # seconds, at most: --patience


def start(out, devices, *more, environment=None):
    command = [sys.executable, "-m", "adabatch_jax", "train", "--out", str(out), *OPTIONS, *more]
    everything = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    everything |= environment or {}
    return subprocess.Popen(
        command, env=everything, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def slurm(process):
    """What Slurm tells a task of a job with two of them."""
    told = {"JOB_ID": os.getpid(), "STEP_NODELIST": "localhost", "NTASKS": 2}
    told |= {"PROCID": process, "LOCALID": process}
    return {f"SLURM_{name}": str(value) for name, value in told.items()}


@contextlib.contextmanager
def two_processes(out, *more, under_slurm=False):
    """Both, as they run; none is left behind."""
    more = ("--patience", str(DEATH_IS_NOTICED), *more)
    if under_slurm:
        auto = ("--distributed", "auto")
        both = [start(out, 4, *auto, *more, environment=slurm(i)) for i in range(2)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2")
        both = [start(out, 4, *where, "--process-id", str(i), *more) for i in range(2)]
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def result(out):
    """Parameters, and the metrics by column."""
    params, _ = classifier("logistic", load_dataset("digits"), 0)
    return load_params(out / "checkpoint", params), read_metrics(out / "metrics.csv")


def difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in pairs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, by its number of devices."""
    found = {}
    for devices in (1, 8):
        out = tmp_path_factory.mktemp(f"devices{devices}")
        said, _ = (process := start(out, devices)).communicate(timeout=300)
        assert process.returncode == 0, said
        found[devices] = result(out)
    return found


def wait_for_checkpoint(out, process, least):
    give_up = time.monotonic() + 200
    while not any(int(p.name) >= least for p in out.glob("state/*") if p.name.isdecimal()):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)


def test_the_same_run_comes_out(tmp_path, alone):
    with two_processes(tmp_path, "--checkpoint-every", "20") as both:
        said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "process 1 of 2, 4 of 8 devices" in said[1] and "test accuracy" not in said[1]
    params, columns = result(tmp_path)
    sizes = columns["batch_size"]
    assert sizes.max() >= 16 * sizes.min() and np.count_nonzero(np.diff(sizes)) >= 5
    print("\nlargest relative difference of the parameters, and batch sizes")
    for name, (other, its) in (
        ("2 processes x 4 devices", (params, columns)),
        *((f"1 process x {devices} device(s)", run) for devices, run in alone.items()),
    ):
        differs = difference(other, params)
        print(f"{name:24s} {differs:8.1e}  {' '.join(map(str, dict.fromkeys(its['batch_size'])))}")
        np.testing.assert_array_equal(its["batch_size"], sizes)
        assert differs < 1e-4


def test_when_one_dies_the_other_stops_and_says_how_to_go_on(tmp_path, alone):
    with two_processes(tmp_path, "--checkpoint-every", "3") as (first, second):
        wait_for_checkpoint(tmp_path, first, 9)
        second.kill()
        killed = time.monotonic()
        said, _ = first.communicate(timeout=100)
        assert time.monotonic() - killed < 3 * DEATH_IS_NOTICED
    assert first.returncode != 0
    assert re.search("another process does not answer.*--resume auto|another task died", said)
    assert "If one process dies, all stop within 10 s; --resume auto goes on" in said
    # On another number of devices, in one process.
    again, _ = (process := start(tmp_path, 2, "--resume", "auto")).communicate(timeout=300)
    assert process.returncode == 0, again
    assert "devices 8 (now 2)" in again and "processes 2 (now 1)" in again
    params, columns = result(tmp_path)
    np.testing.assert_array_equal(columns["batch_size"], alone[1][1]["batch_size"])
    assert difference(params, alone[1][0]) < 1e-4


def test_a_preemption_notice_to_one_stops_both_at_the_same_step(tmp_path, alone):
    with two_processes(tmp_path, "--checkpoint-every", "3") as both:
        wait_for_checkpoint(tmp_path, both[0], 9)
        both[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=100)[0] for process in both]
    steps = [re.search(r"stopped by SIGTERM after step (\d+); its state is saved", s) for s in said]
    assert steps[0] and steps[1] and steps[0][1] == steps[1][1], said
    assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2
    with two_processes(tmp_path, "--resume", under_slurm=True) as both:
        said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    params, columns = result(tmp_path)
    np.testing.assert_array_equal(columns["batch_size"], alone[8][1]["batch_size"])
    assert difference(params, alone[8][0]) < 1e-4
