"""The notebook: what it computes when it runs from top to bottom, and what is committed."""

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune_lora import DEFAULT_CHECKPOINT
from tests.run_folders import names_in

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "finetune_lora_notebook.ipynb"
LITTER = re.compile(r"/(root|home|Users|tmp|var|usr|opt|mnt|work)/|[A-Z]:\\|[Ww]arning")
SECTIONS = (
    *("Set-up", "The data", "The MoCo backbone", "Adding LoRA", "Training"),
    *("Visualization", "Evaluation", "Checkpoints", "QLoRA"),
)
WITH_PICTURES = {2, 3, 5, 6, 7, 9}

# In place of the cell tagged "parameters"; nothing else differs from what a reader runs.
# In place of photographs stand the digits on paper, which the notebook itself has written by then.
PARAMETERS = f"""
EPOCHS, LABELS_PER_CLASS = 3, 20
PHOTOGRAPHS, BACKBONE = "checkpoints/notebook/paper", {str(DEFAULT_CHECKPOINT)!r}
"""

# What is read out of the kernel after the last cell.
REPORT = """
import json
print(json.dumps({
    "k-NN": {"random": knn_random, "moco": knn_moco, "pixels": knn_pixels, "lora": knn_after},
    "runs": {"lora": lora, "qlora": qlora, "full": full},
    "photographs": photographs,
    "probe": probe,
    "evaluated": result.accuracy,
    "differences": [start_difference, off_difference, reload_difference, merged_difference],
    "same_answers": same_answers,
    "images": len(splits.val),
    "bits_per_weight": bits_per_weight["QLoRA"],
}))
"""


def read_notebook():
    import nbformat  # takes seconds, which nobody who collects the tests has to wait for

    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(cells) -> list:
    found = []
    for cell in cells:
        if cell.cell_type == "code":
            found += cell.outputs
    return found


def pictures(cells) -> list[np.ndarray]:
    """Grey levels of every picture in the outputs."""
    found = []
    for output in outputs(cells):
        png = output.get("data", {}).get("image/png")
        if png:
            found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L")))
            assert found[-1].std() > 10  # not blank
    return found


def sections(notebook) -> list[list]:
    """The cells of each section; the introduction is left out."""
    parts: list[list] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            parts.append([])
        if parts:
            parts[-1].append(cell)
    return parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(folder):
    """The notebook, run from top to bottom in an empty folder on the CPU; its last cell prints REPORT."""
    import nbformat
    from nbclient import NotebookClient

    notebook = read_notebook()
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = PARAMETERS
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute(env=environment)
    return notebook


@pytest.fixture(scope="module")
def computed(executed) -> dict[str, Any]:
    return json.loads(executed.cells[-1].outputs[-1]["text"])


def test_what_it_says_of_its_runs_is_so(computed):
    knn = computed["k-NN"]
    runs = computed["runs"]
    assert knn["random"] + 0.1 < knn["moco"] < knn["pixels"] and knn["lora"] > knn["moco"]
    for name in ("lora", "qlora"):
        assert runs[name]["val_accuracy"] > runs[name]["knn_accuracy_before"], name
    assert runs["full"]["val_accuracy"] > 0.8  # its learning rate is made for more steps than these
    assert computed["evaluated"] == pytest.approx(runs["lora"]["val_accuracy"], abs=1e-6)
    assert computed["probe"]["val_accuracy"] > 0.9
    assert 4 < computed["bits_per_weight"] < 4.5


def test_files_and_merged_weights_give_the_same_answers(computed, folder):
    at_start, switched_off, reloaded, merged = computed["differences"]
    assert max(at_start, switched_off, reloaded) < 1e-5 and merged < 1e-3
    assert computed["same_answers"] == computed["images"] == 359
    written = folder / "checkpoints" / "notebook"
    for name in ("my_adapter.pth", "merged.pth", "lora/lora.pth", "qlora/metrics.csv", "full/results.json"):
        assert (written / name).exists(), name
    assert names_in(folder) == {"checkpoints"} and names_in(folder / "checkpoints") == {"notebook"}


def test_it_draws_what_is_committed_and_photographs_where_they_are_given(executed, computed):
    drawn = pictures(executed.cells)
    assert len(drawn) == len(pictures(read_notebook().cells)) + 2  # the curves and the mistakes of the photographs
    assert computed["photographs"]["val_accuracy"] > 0.8


def test_nine_sections_with_their_pictures_are_committed_as_executed():
    import nbformat

    notebook = read_notebook()
    nbformat.validate(notebook)
    for number, (part, title) in enumerate(zip(sections(notebook), SECTIONS, strict=True), 1):
        assert part[0].source.splitlines()[0] == f"## {number}. {title}"
        assert bool(pictures(part)) == (number in WITH_PICTURES)
    assert NOTEBOOK.stat().st_size < 2e6
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            count += 1
            assert cell.execution_count == count
            assert "execution" not in cell.metadata  # times: noise in every diff


def test_no_litter_in_what_is_committed():
    printed = ""
    for output in outputs(read_notebook().cells):
        assert output.output_type != "error" and output.get("name") != "stderr"  # progress bars are gone when they end
        printed += output.get("text", "")
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                assert not LITTER.search(data)
    assert len(printed.splitlines()) < 150 and not LITTER.search(printed)
