"""`train --steps-per-call`, whose loop runs on eight devices: the same as one call for each step."""

import jax
import numpy as np

from adabatch_jax.training import TrainConfig, load_dataset, run_steps


def test_chunks_on_eight_devices_are_the_steps_bit_for_bit():
    dataset = load_dataset("digits")
    ends, tables = [], []
    for steps in (1, 40):
        rows = []
        config = TrainConfig(
            model="logistic", epochs=1, max_batch_size=128, devices=8, steps_per_call=steps
        )
        ends.append(run_steps(config, dataset, rows.append).params)
        tables.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    jax.tree.map(np.testing.assert_array_equal, *ends)
    jax.tree.map(np.testing.assert_array_equal, *tables)
    assert tables[0][-1]["next_batch_size"] >= 32
