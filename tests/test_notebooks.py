"""Every notebook runs from a clean kernel, opens in Colab, and is small enough to review."""

import pathlib
import shutil

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 300_000


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab(path):
    assert path.stat().st_size < MAX_BYTES, "clear or shrink its pictures"
    cells = nbformat.read(path, as_version=4).cells
    title = next(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "colab.research.google.com/github/" in title, "no Colab badge in the first text"
    assert f"notebooks/{path.name}" in title, "the Colab badge leads to another notebook"


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """In a copy, on this checkout: the install cell finds adabatch_jax and leaves it alone."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(shutil.copy(path, tmp_path), as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    ).execute()
