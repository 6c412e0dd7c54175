"""A model card: what an adapter is, what it can do, and how to load it, as the Hugging Face Hub shows it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from toolkit import VERSION, listed
from toolkit.answers.tasks import from_record
from toolkit.models.checkpoints import value_at
from toolkit.models.published import PUBLISHED

MOCO_LICENCE = "cc-by-nc-4.0"  # of the files of MoCo's authors


def write_card(metadata: Mapping[str, Any], results: Mapping[str, Any], name: str, file: str) -> str:
    """The card of an adapter file as Markdown, after the Hub's block of metadata (hf.co/docs/hub/model-cards)."""
    stage1 = metadata.get("stage1_adapter")
    needs = f", and `{Path(str(stage1)).name}`, which is merged into it, has to lie next to `{file}`" if stage1 else ""
    base = Path(str(metadata["checkpoint"])).name
    published = {Path(url).name: known for known, (url, _) in PUBLISHED.items()}
    base = published.get(base, base)
    task = from_record(metadata.get("task"), metadata["class_names"], file)
    figures = _figures(results)
    about: dict[str, Any] = {"license": MOCO_LICENCE if base in PUBLISHED and base.startswith("moco") else "unknown"}
    about["tags"] = ["lora", "moco", str(metadata["arch"])]
    if task.pipeline is not None:
        about["pipeline_tag"] = task.pipeline
        metrics = [{"type": figure, "value": value} for figure, value, _ in figures]
        measured = {"task": {"type": task.pipeline}, "metrics": metrics}
        measured["dataset"] = {"name": _data(metadata), "type": "private"}
        about["model-index"] = [{"name": name, "results": [measured]}] if metrics else []
    what = "Adapters (LoRA)" if metadata.get("lora") else "Weights"
    return f"""---
{_yaml(about)}---

# {name}

{what} for {metadata["arch"]}, trained over `{base}` on {_data(metadata)}: {task.kind} of images of \
{metadata["image_size"]} pixels into {listed(metadata["class_names"], 30)}.

The licence of the base holds for what is made of it. Look it up on its publisher's page.

## Results

{_table(figures, results)}

## To use it

```bash
python deploy_lora.py predict {file} my_images --output {task.predicted_into} --checkpoint BASE
```

`BASE` is the file of `{base}`{needs}. In Python: `model, info = load_finetuned('{file}', 'BASE')`.

## Settings, of version {metadata.get("version", VERSION)} of the toolkit

```yaml
{_yaml(value_at(metadata, "config/finetune") or {})}```
"""


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _figures(results: Mapping[str, Any]) -> list[tuple[str, float, list[float]]]:
    """(name, value, its 95% interval) of each figure of a run that has an interval."""
    found = []
    for key, interval in results.items():
        value = results.get(key.removesuffix("_interval"))
        if key.endswith("_interval") and isinstance(value, int | float) and isinstance(interval, list):
            found.append((key.removesuffix("_interval").removeprefix("val_"), value, interval))
    return found


def _table(figures: list[tuple[str, float, list[float]]], results: Mapping[str, Any]) -> str:
    if not figures:
        return "Not measured."
    about = f"On {results['val_images']:,} evaluation images"
    if results.get("eval_split") == "validation":
        about += ", set aside of the training images to choose settings by"
    if "epoch" in results.get("chosen_by", {}):
        about += ", which chose the epoch: on others the figures are lower"
    rows = [f"{about}:", "", "| | | 95% interval |", "|---|---|---|"]
    rows += [f"| {name} | {value:.4g} | {low:.4g} to {high:.4g} |" for name, value, (low, high) in figures]
    score, *_ = figures[0]
    before = results.get(f"probe_{score}_before")
    if before is not None:
        rows.append(f"| {score} of the linear probe, before training | {before:.4g} | |")
    return "\n".join(rows)


def _data(metadata: Mapping[str, Any]) -> str:
    """The images of a run, by the name of their list or folder: a path says more than a stranger is to know."""
    places = value_at(metadata, "config/data/data_list")
    if not isinstance(places, list):
        known = (value_at(metadata, f"config/data/{name}") for name in ("data_dir", "dataset"))
        places = [next(filter(None, known), "unknown images")]
    return listed([Path(str(place)).name for place in places])
