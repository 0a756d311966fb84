"""Notebooks run top to bottom in Jupyter, from their own folder: readings on the published records, runs small."""

import shutil
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat import v4
from test_notebooks import MAKES_A_MODEL, READINGS, ROOT

from pruning_lib.models import families, loading

LITTLE = {"calibration": "mini_prompts", "prompts": 4, "text": "mini_text", "tokens": 300, "window": 100}
OF_A_MODEL = {**LITTLE, "removed_fraction": 0.1}
SMALL = {  # run -> parameters of a run that takes seconds
    "by_hand": {}, "metrics_forgive": {"per_class": 12},
    "block_costs": {"repetitions": 2, "batch_images": 2},
    "inference_speed": {"repetitions": 6, "batches": "1", "prompt_tokens": "8", "new_tokens": 2},
    "amp_prune": {**OF_A_MODEL, "methods": "amp"},
    "recipe": {**OF_A_MODEL, "reconstruction": "none", "window": 400},  # the text is one window
    "calibration_draws": {**OF_A_MODEL, "methods": "amp random", "draws": 2, "random_draws": 2},
    "language_blocks": {**LITTLE, "metrics": "cka", "calibration": "mini_calibration_text"},
    "zero_shot": {"calibration": "mini_prompts", "prompts": 4, "removed_fraction": 0.1},
    "fused_families": {"calibration": "mini_prompts", "prompts": 4, "removed_fraction": 0.15, "heads_removed": 2},
    "consensus_prune": {"criterion": "cka", "rounds": 1, "start_epochs": 0.0, "round_epochs": 0.0, "final_epochs": 0.0,
                        "per_class": 4, "probe_images": 20, "test_images": 20},
    "consensus_scores": {"start_epochs": 0.0, "per_class": 16}}
WHOLE = {"consensus_scores"}  # its network is scored, not cut


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Return a kernel with nothing set by the runner; its imports, which take longest, are shared by all notebooks."""
    manager = AsyncKernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("PRUNING_RESULTS", "PRUNING_RECORDS", "PRUNING_RUN", "PRUNING_PARAMETERS", "PRUNING_DATA"):
            patch.delenv(variable, raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PRUNING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.fixture
def execute(kernel):
    """Return a function that runs a notebook from a folder as Jupyter does; it begins without any name."""

    def run(folder, name, **given):
        notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells if given else ():
            if "parameters" in cell.metadata.get("tags", []):
                cell.source += "".join(f"\n{key} = {value!r}" for key, value in given.items())
        notebook.cells.insert(0, v4.new_code_cell(f"%reset -f\n%cd -q {folder}"))
        NotebookClient(notebook, km=kernel, timeout=240).execute()

    return run


@pytest.mark.parametrize("name", sorted(READINGS))
def test_a_reading_runs_from_its_own_folder(name, execute):
    before = set(Path(ROOT / "notebooks").iterdir())
    execute(ROOT / "notebooks", name)
    assert set(Path(ROOT / "notebooks").iterdir()) == before


@pytest.mark.parametrize("name", SMALL)
def test_a_run_runs_from_its_own_folder_and_its_model_can_be_loaded(name, execute, dense, tmp_path):
    folder = shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("results"))
    (tmp_path / "data").symlink_to(ROOT / "data")
    given = {**SMALL[name], **({"model": "../dense"} if "prompts" in SMALL[name] else {}),
             **({"save_to": "../saved"} if name in MAKES_A_MODEL else {})}
    execute(folder, name, **given)
    assert (folder / "results" / f"{name}.json").is_file()
    if name in MAKES_A_MODEL:
        saved, _ = loading.load_model(str(tmp_path / "saved"))
        if families.is_image_network(saved):
            assert len(families.residual_blocks(saved)) == (9 if name in WHOLE else 8)  # of a ResNet-20
        else:
            assert saved.num_parameters() < loading.load_model(str(dense))[0].num_parameters()


def test_every_run_that_makes_a_model_is_tried_here():
    assert set(SMALL) >= MAKES_A_MODEL
