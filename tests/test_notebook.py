"""The notebook: what it computes when it runs from top to bottom, and what is committed."""

import base64
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.run_folders import column, names_in

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "finetune_lora_notebook.ipynb"
LITTER = re.compile(r"/(root|home|Users|tmp|var|usr|opt|mnt|work)/|[A-Z]:\\|[Ww]arning|lora-1")
PERCENT = re.compile(r"\d+\.\d+%")
SECTIONS = "Set-up, The data, The MoCo backbone, Adding LoRA, Training, Visualization, Evaluation, Checkpoints, QLoRA"

# What is read out of the kernel after the last cell.
REPORT = """
import json
predicted = np.mean([row["class"] == Path(row["path"]).parent.name for row in rows])
differences = [start_difference, off_difference, reload_difference, merged_difference]
about = [result.accuracy, predicted, differences, same_answers, qlora.accuracy, bits_per_weight["QLoRA"]]
print(json.dumps([results, *about]))
"""


def committed() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def outputs(cells) -> list:
    return [output for cell in cells for output in cell.get("outputs", [])]


def count_pictures(cells) -> int:
    """How many are in the outputs, none of them blank."""
    shown = ["".join(output.get("data", {}).get("image/png", "")) for output in outputs(cells)]
    pictures = [Image.open(io.BytesIO(base64.b64decode(png))).convert("L") for png in shown if png]
    assert min(np.asarray(picture).std() for picture in pictures) > 10
    return len(pictures)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_in_an_empty_folder(tmp_path):
    """A short run is no worse than its probe, its files answer as it did, and the pictures are those committed."""
    import nbformat  # takes seconds, which nobody who collects the tests has to wait for
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = "LABELS_PER_CLASS, EPOCHS = 5, 2"  # nothing else differs from what a reader runs
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute(env=environment)
    assert count_pictures(notebook.cells) == count_pictures(committed())
    assert [output for output in outputs(notebook.cells) if output.get("name") == "stderr"] == []  # nor bars

    computed = json.loads(notebook.cells[-1].outputs[-1]["text"])
    run, evaluated, predicted, differences, same_answers, of_qlora, bits_per_weight = computed
    assert run["train_images"] == 50 and run["unlabelled"]["trained"]
    assert run["unlabelled"]["images"] == 1797 - 50 - 359
    assert run["val_accuracy"] > run["probe_accuracy_before"] > 0.8
    assert [evaluated, predicted] == pytest.approx([run["val_accuracy"]] * 2, abs=1e-6)
    assert of_qlora > 0.8 and 4 < bits_per_weight < 4.5
    *differences, merged = differences  # at the start, switched off, and reloaded
    assert max(differences) < 1e-5 and merged < 1e-3
    assert same_answers == run["val_images"] == 359
    written = {"digits", "lora", "predictions.csv", "merged.pth", "merged.json", "my_adapter.pth", "qlora.pth"}
    assert names_in(tmp_path / "checkpoints/notebook") == written
    assert names_in(tmp_path) == {"checkpoints"} and names_in(tmp_path / "checkpoints") == {"notebook"}


def test_nine_sections_are_committed_as_executed_show_a_gain_and_say_each_number_once():
    texts = "\n".join("".join(cell["source"]) for cell in committed() if cell["cell_type"] == "markdown")
    assert re.findall(r"^## \d\. (.*)$", texts, re.MULTILINE) == SECTIONS.split(", ")
    code = [cell for cell in committed() if cell["cell_type"] == "code"]
    assert column(code, "execution_count") == list(range(1, len(code) + 1))
    for cell in code:
        assert "execution" not in cell["metadata"]  # times: noise in every diff
        kinds = [output.get("name", output["output_type"]) for output in cell["outputs"]]
        assert "error" not in kinds and "stderr" not in kinds
        assert kinds.count("stdout") <= 1  # else each line would stand in a box of its own
    shown = ""  # texts and tables
    for output in outputs(code):
        shown += "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/markdown", "")) + "\n"
    assert len(shown.splitlines()) < 150 and not LITTER.search(shown)
    assert NOTEBOOK.stat().st_size < 1e6
    [before, after] = re.findall(r"\| (?:linear probe|this run).*? \| ([\d.]+%) \| \d+ of 359 \|", shown)
    assert float(after[:-1]) >= float(before[:-1]) + 5
    assert f"linear probe before   {before}" in shown and f"of 359 images, {after}" in shown
    assert {before, after} <= set(PERCENT.findall(texts)) <= set(PERCENT.findall(shown))
