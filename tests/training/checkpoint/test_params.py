"""Parameters on disk: what comes back is what was saved, or one line that says why not."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from adabatch_jax.training import load_params, save_params


def parameters(seed=0, width=300):
    """Arrays long enough to get files of their own, and short ones that do not."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "Dense_0": {
            "kernel": jax.random.normal(keys[0], (8, width)),
            "bias": jax.random.normal(keys[1], (width,)),
        },
        "Dense_1": {"kernel": jax.random.normal(keys[2], (width, 2)), "bias": jnp.zeros(2)},
    }


def assert_same(found, params):
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint"
    save_params(path, parameters())
    return path


def test_what_is_saved_comes_back_bit_for_bit(saved):
    found = load_params(saved, parameters(seed=1))
    assert_same(found, parameters())
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


def test_a_former_checkpoint_is_replaced_and_nothing_is_left_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, width in ((0, 5), (1, 7)):  # a relative path; a folder that is missing
        save_params("new/checkpoint", parameters(seed, width))
        assert_same(load_params("new/checkpoint", parameters(9, width)), parameters(seed, width))
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["checkpoint"]


def test_a_save_that_fails_leaves_the_former_checkpoint(saved, monkeypatch):
    def fail(self, directory, *args, **kwargs):
        directory.mkdir()
        raise OSError("no space left")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_params(saved, parameters(seed=1))
    monkeypatch.undo()
    assert_same(load_params(saved, parameters()), parameters())
    assert [p.name for p in saved.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("like", "why"),
    [
        (parameters(width=299), r"another model: params.Dense_0.\w+ is float32\[.*300\], expected"),
        ({**parameters(), "Dense_2": {"bias": jnp.zeros(2)}}, "damaged, or of another model"),
        ({"Dense_0": parameters()["Dense_0"]}, "damaged, or of another model"),
    ],
    ids=["shape", "too few", "too many"],
)
def test_parameters_of_another_model_are_refused(saved, like, why):
    with pytest.raises(ValueError, match=why) as caught:
        load_params(saved, like)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        load_params(tmp_path / "checkpoint", parameters())
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ValueError, match="damaged"):
        load_params(tmp_path / "checkpoint", parameters())


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_no_damage_to_any_file_goes_unnoticed(saved, damage, tmp_path, capfd):
    """Orbax keeps some files that it never reads; without them the parameters must be right."""
    files = sorted(p.relative_to(saved) for p in saved.rglob("*") if p.is_file())
    refused = []
    for number, file in enumerate(files):
        copy = shutil.copytree(saved, tmp_path / str(number))
        content = bytearray((copy / file).read_bytes())
        if content:
            content[len(content) // 2] ^= 0xFF
        if damage == "gone":
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(content[: len(content) // 2] if damage == "cut" else content)
        try:
            assert_same(load_params(copy, parameters()), parameters())
        except ValueError as error:
            refused.append(str(error))
    assert all("damaged" in said and "\n" not in said for said in refused)
    assert len(refused) >= 3, "the manifest, the tree and the long arrays at least"
    assert capfd.readouterr().err == "", "no traceback of Orbax's own"
