"""Files: strict JSON, and all or nothing."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from adabatch_jax.training._files import atomic_path, write_json


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_json_is_strict(tmp_path):
    path = tmp_path / "deep" / "result.json"
    data = {
        "nothing": math.nan,
        "far": [math.inf, -math.inf, 1.5],
        "single": np.float32(0.1),
        "double": np.float64(0.1),
        "half": jnp.bfloat16(0.5),
        "count": np.int64(2**40),
        "flag": np.bool_(True),
        "array": np.array([[1.0, np.nan]], np.float32),
        "device": jnp.arange(3),
        "path": tmp_path,
        "text": "η",
        "none": None,
        7: (True, 3),
    }
    write_json(path, data)
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert json.loads(text, parse_constant=refuse) == {
        "nothing": None,
        "far": [None, None, 1.5],
        "single": 0.1,
        "double": 0.1,
        "half": 0.5,
        "count": 2**40,
        "flag": True,
        "array": [[1.0, None]],
        "device": [0, 1, 2],
        "path": str(tmp_path),
        "text": "η",
        "none": None,
        "7": [True, 3],
    }


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, np.array(["a"]).astype("S")])
def test_json_refuses_the_rest_and_keeps_the_old_file(tmp_path, value):
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError, match="write_json: cannot write"):
        write_json(path, {"new": value})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [path] == list(tmp_path.iterdir())


def test_atomic_path_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def failing_write():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_write()
    assert path.read_text() == "old"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [path] == list(tmp_path.iterdir())
