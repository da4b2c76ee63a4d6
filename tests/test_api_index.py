"""API.md says what the docstrings say."""

import importlib

import pytest

import adabatch_jax
from tests import api_index


def test_the_index_is_that_of_the_docstrings():
    written = api_index.PATH.read_text(encoding="utf-8")
    assert written == api_index.index(), "stale: run python tests/api_index.py"


def test_every_public_name_is_there_once():
    names = [line for line in api_index.index().splitlines() if line.startswith("| `")]
    rooms = [importlib.import_module(f"adabatch_jax.{room}") for room in api_index.ROOMS]
    assert len(names) == sum(len(room.__all__) for room in rooms)
    assert sum(" * |" in name for name in names) == len(adabatch_jax.__all__)


def test_a_name_without_a_docstring_is_refused(monkeypatch):
    monkeypatch.setattr(adabatch_jax.noise.merge_noise, "__doc__", None)
    with pytest.raises(ValueError, match=r"noise\.merge_noise has no docstring"):
        api_index.index()


def test_a_public_name_of_no_room_is_refused(monkeypatch):
    monkeypatch.setattr(adabatch_jax, "__all__", [*adabatch_jax.__all__, "stray"])
    with pytest.raises(ValueError, match=r"in no room.*stray"):
        api_index.index()
