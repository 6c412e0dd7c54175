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

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "finetune_lora_notebook.ipynb"
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
    "on paper": [knn_paper, knn_adapted],
    "stage 1": str(stage1["checkpoint"]),
    "runs": {"lora": lora, "qlora": qlora, "full": full},
    "photographs": photographs,
    "probe": probe,
    "epochs": [row["epoch"] for row in metrics],
    "evaluated": result.accuracy,
    "per_class": per_class,
    "spectra": {kind: values.tolist() for kind, values in spectra.items()},
    "differences": [start_difference, off_difference, reload_difference, merged_difference],
    "same_answers": same_answers,
    "images": len(splits.val),
    "refused": refused,
    "batch_norm_trains": resnet.bn1.training,
    "bits_per_weight": bits_per_weight["QLoRA"],
    "rounded": (four_bit[by_size] - exact).abs().max().item() / exact.abs().max().item(),
    "memory": memory,
}))
"""


def read_notebook():
    import nbformat  # takes seconds, which nobody who collects the tests has to wait for

    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(cells) -> list:
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(cells) -> list[np.ndarray]:
    """Grey levels of every picture in the outputs."""
    found = [output.get("data", {}).get("image/png") for output in outputs(cells)]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L")) for png in found if png]


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


def test_what_it_says_of_its_runs_is_so(computed, folder):
    knn, runs = computed["k-NN"], computed["runs"]
    # What the prose says of the three.
    assert knn["random"] + 0.1 < knn["moco"] < knn["pixels"]
    for name in ("lora", "qlora"):
        assert runs[name]["val_accuracy"] > runs[name]["knn_accuracy_before"], name
    assert runs["full"]["val_accuracy"] > 0.8  # its learning rate is made for more steps than these
    assert knn["lora"] > knn["moco"]
    assert computed["epochs"] == [1, 2, 3]
    before, after = computed["on paper"]
    assert before < computed["k-NN"]["moco"] - 0.1
    assert after > before - 0.01  # 12 steps without a label change the answers for a few images; the notebook has more
    assert (folder / computed["stage 1"]).stat().st_size < 1e6
    lora = computed["runs"]["lora"]
    assert computed["evaluated"] == pytest.approx(lora["val_accuracy"], abs=1e-6)
    assert computed["per_class"] == pytest.approx([100 * x for x in lora["accuracy_per_class"].values()], abs=1e-3)
    head = 192 * 10 + 10
    trained = {name: run["trainable_parameters"] for name, run in runs.items()}
    assert trained["lora"] == trained["qlora"] == head + runs["lora"]["lora_parameters"]
    assert trained["full"] == runs["full"]["total_parameters"]
    assert computed["probe"]["trainable_parameters"] == head and computed["probe"]["val_accuracy"] > 0.9
    assert computed["batch_norm_trains"] is False
    values = np.array(list(computed["spectra"].values()))  # (kinds, blocks, r)
    assert values.shape == (6, 6, 8)
    assert (values[..., 0] > 1e-3).all() and (np.diff(values) <= 1e-6).all()


def test_files_and_merged_weights_give_the_same_answers(computed, folder):
    at_start, switched_off, reloaded, merged = computed["differences"]
    assert max(at_start, switched_off, reloaded) < 1e-5 and merged < 1e-3
    assert computed["same_answers"] == computed["images"] == 359
    assert "r 8 in the file, 4 here" in computed["refused"]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    runs = {f"{run}/{name}" for run in computed["runs"] for name in ("lora.pth", "results.json", "metrics.csv")}
    assert {f"checkpoints/notebook/{name}" for name in (*runs, "my_adapter.pth", "merged.pth")} <= files
    assert all(name.startswith("checkpoints/notebook/") for name in files)
    (weights, whole), (weights_4_bit, whole_4_bit) = computed["memory"]["LoRA"], computed["memory"]["QLoRA"]
    assert 4 < computed["bits_per_weight"] == 32 * weights_4_bit / weights < 4.5
    assert whole - whole_4_bit == weights - weights_4_bit
    assert 0.01 < computed["rounded"] < 0.2  # of the largest weight of the block; half the widest step is 0.15


def test_it_draws_what_is_committed_and_photographs_where_they_are_given(executed, computed, folder):
    drawn, committed = pictures(executed.cells), pictures(read_notebook().cells)
    assert len(drawn) == len(committed) + 2  # of the photographs
    assert all(picture.std() > 10 for picture in drawn)  # not blank
    assert computed["photographs"]["val_accuracy"] > 0.8
    assert (folder / "checkpoints/notebook/photographs/lora.pth").exists()
    (last_code,) = code_cells(executed)[-2:-1]
    assert len(pictures([last_code])) == 2  # the curves and the mistakes


def test_nine_sections_with_their_pictures_are_committed_as_executed():
    import nbformat

    notebook = read_notebook()
    nbformat.validate(notebook)
    parts = sections(notebook)
    assert [part[0].source.splitlines()[0] for part in parts] == [f"## {i}. {t}" for i, t in enumerate(SECTIONS, 1)]
    assert {number for number, part in enumerate(parts, 1) if pictures(part)} == WITH_PICTURES
    assert all(picture.std() > 10 for picture in pictures(notebook.cells))
    assert NOTEBOOK.stat().st_size < 2e6
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [cell for cell in cells if "execution" in cell.metadata]  # times: noise in every diff
    assert not [output for output in outputs(cells) if output.output_type == "error"]


def test_no_litter_in_what_is_committed():
    found = outputs(read_notebook().cells)
    streams = {name: "".join(o["text"] for o in found if o.get("name") == name) for name in ("stdout", "stderr")}
    assert not streams["stderr"].strip()  # progress bars are gone when they end
    assert len(streams["stdout"].splitlines()) < 150
    shown = [data for o in found for kind, data in o.get("data", {}).items() if kind.startswith("text/")]
    text = "\n".join([*streams.values(), *shown])
    assert not re.search(r"/(root|home|Users|tmp|var|usr|opt|mnt|work)/|[A-Z]:\\|[Ww]arning", text)
