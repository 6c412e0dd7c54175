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

from tests.run_folders import names_in

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "finetune_lora_notebook.ipynb"
LITTER = re.compile(r"/(root|home|Users|tmp|var|usr|opt|mnt|work)/|[A-Z]:\\|[Ww]arning|lora-1")
PERCENT = re.compile(r"\d+\.\d+%")
SECTIONS = "Set-up, The data, The MoCo backbone, Adding LoRA, Training, Visualization, Evaluation, Checkpoints, QLoRA"

# In place of the cell tagged "parameters"; nothing else differs from what a reader runs.
PARAMETERS = "LABELS_PER_CLASS, EPOCHS = 5, 2"

# What is read out of the kernel after the last cell.
REPORT = """
import json
print(json.dumps({
    "run": results,
    "evaluated": result.accuracy,
    "predicted": np.mean([row["class"] == Path(row["path"]).parent.name for row in rows]),
    "differences": [start_difference, off_difference, reload_difference, merged_difference],
    "same_answers": same_answers,
    "qlora": qlora.accuracy,
    "bits_per_weight": bits_per_weight["QLoRA"],
}))
"""


def committed() -> list[dict]:
    """The cells as they are committed; texts are lists of lines."""
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def outputs(cells) -> list:
    return [output for cell in cells for output in cell.get("outputs", [])]


def printed(cells) -> str:
    """The texts and tables in the outputs."""
    found = ""
    for output in outputs(cells):
        found += "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/markdown", "")) + "\n"
    return found


def texts(cells) -> str:
    """What is written between the code."""
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def pictures(cells) -> list[np.ndarray]:
    """Grey levels of every picture in the outputs."""
    found = []
    for output in outputs(cells):
        if png := output.get("data", {}).get("image/png"):
            found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode("".join(png)))).convert("L")))
            assert found[-1].std() > 10  # not blank
    return found


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook, run from top to bottom in an empty folder on the CPU; its last cell prints REPORT."""
    import nbformat  # takes seconds, which nobody who collects the tests has to wait for
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = PARAMETERS
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute(env=environment)
    return folder, notebook.cells, json.loads(notebook.cells[-1].outputs[-1]["text"])


@pytest.mark.slow
def test_a_short_run_is_no_worse_than_its_probe_and_its_file_answers_as_it_did(executed):
    _, _, computed = executed
    run = computed["run"]
    assert run["train_images"] == 50 and run["unlabelled"]["trained"]
    assert run["unlabelled"]["images"] == 1797 - 50 - 359
    assert run["val_accuracy"] > run["probe_accuracy_before"] > 0.8
    assert [computed["evaluated"], computed["predicted"]] == pytest.approx([run["val_accuracy"]] * 2, abs=1e-6)
    assert computed["qlora"] > 0.8 and 4 < computed["bits_per_weight"] < 4.5


@pytest.mark.slow
def test_files_and_merged_weights_give_the_same_answers(executed):
    folder, _, computed = executed
    at_start, switched_off, reloaded, merged = computed["differences"]
    assert max(at_start, switched_off, reloaded) < 1e-5 and merged < 1e-3
    assert computed["same_answers"] == computed["run"]["val_images"] == 359
    written = {"digits", "lora", "predictions.csv", "merged.pth", "merged.json", "my_adapter.pth", "qlora.pth"}
    assert names_in(folder / "checkpoints" / "notebook") == written
    assert names_in(folder) == {"checkpoints"} and names_in(folder / "checkpoints") == {"notebook"}


@pytest.mark.slow
def test_it_draws_what_is_committed_and_no_bars(executed):
    _, cells, _ = executed
    assert len(pictures(cells)) == len(pictures(committed()))
    assert [output for output in outputs(cells) if output.get("name") == "stderr"] == []


def test_nine_sections_are_committed_as_executed():
    titles = re.findall(r"^## \d\. (.*)$", texts(committed()), re.MULTILINE)
    assert titles == SECTIONS.split(", ")
    code = [cell for cell in committed() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))


def test_what_is_committed_shows_a_gain_and_says_each_number_once():
    cells = committed()
    shown = printed(cells)
    [before, after] = re.findall(r"\| (?:linear probe|this run).*? \| ([\d.]+%) \| \d+ of 359 \|", shown)
    assert float(after[:-1]) >= float(before[:-1]) + 5
    assert f"linear probe before   {before}" in shown
    assert f"of 359 images, {after}" in shown
    told = PERCENT.findall(texts(cells))
    assert {before, after} <= set(told) <= set(PERCENT.findall(shown))


def test_no_litter_in_what_is_committed():
    for cell in committed():
        assert "execution" not in cell["metadata"]  # times: noise in every diff
        kinds = [output.get("name", output["output_type"]) for output in cell.get("outputs", [])]
        assert "error" not in kinds and "stderr" not in kinds
        assert kinds.count("stdout") <= 1  # else each line would stand in a box of its own
    shown = printed(committed())
    assert len(shown.splitlines()) < 150 and not LITTER.search(shown)
    assert NOTEBOOK.stat().st_size < 1e6
