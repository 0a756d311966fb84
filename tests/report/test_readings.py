"""Readings run top to bottom in Jupyter, from the folder of notebooks, on the published records."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_notebooks import READINGS, ROOT


@pytest.mark.parametrize("name", sorted(READINGS))
def test_a_reading_runs_from_its_own_folder(name, monkeypatch):
    for variable in ("PRUNING_RESULTS", "PRUNING_RECORDS", "PRUNING_RUN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = set(Path(ROOT / "notebooks").iterdir())
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    assert set(Path(ROOT / "notebooks").iterdir()) == before
