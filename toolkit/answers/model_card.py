"""A model card: what an adapter is, what it can do, and how to load it, as the Hugging Face Hub shows it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from toolkit import VERSION, listed
from toolkit.answers import parts, tasks
from toolkit.models import published
from toolkit.models.checkpoints import value_at


def write_card(metadata: Mapping[str, Any], results: Mapping[str, Any], name: str, file: str) -> str:
    """The card of an adapter file as Markdown, after the Hub's block of metadata (hf.co/docs/hub/model-cards)."""
    stage1 = metadata.get("stage1_adapter")
    needs = f", and `{Path(str(stage1)).name}`, which is merged into it, has to lie next to `{file}`" if stage1 else ""
    backbone = results.get("backbone") or published.described(metadata["checkpoint"])
    base = backbone["name"]
    source = f" ({backbone['source']})" if backbone["source"] else ""
    task = tasks.from_record(metadata.get("task"), metadata["class_names"], file)
    figures = _figures(results)
    about: dict[str, Any] = {"license": backbone["licence"] or "unknown"}
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

The licence of the base holds for what is made of it: {backbone["licence"] or "look it up on its publisher's page"}\
{source}.

## Intended use and limits

It is for images like the training images, and answers for any image, whatever it shows. For images of another camera, \
place or time the figures below do not hold: measure there first.

## Results

{_table(figures, results, metadata)}
{_by_name(task, results)}
## To use it

```bash
python deploy_lora.py predict {file} my_images --output {task.predicted_into} --checkpoint BASE
```

`BASE` is the path of `{base}`{needs}. In Python: `model, info = load_finetuned('{file}', 'BASE')`.

## Settings, of version {metadata.get("version", VERSION)} of the toolkit

```yaml
{_yaml(value_at(metadata, "config/finetune") or {})}```
"""


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _figures(results: Mapping[str, Any]) -> list[tuple[str, float, list[float] | None]]:
    """(name, value, its 95% interval) of each figure of a run; None where chance cannot be told from the answers."""
    found = []
    for key, interval in results.items():
        value = results.get(key.removesuffix("_interval"))
        if key.endswith("_interval") and isinstance(value, int | float) and isinstance(interval, list | None):
            found.append((key.removesuffix("_interval").removeprefix("val_"), value, interval))
    return found


def _table(figures: list[tuple], results: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    if not figures:
        if "cut to rank" in metadata:
            return f"Not measured since it was cut to rank {metadata['cut to rank']}: `lora_rank` below is the run's."
        goal, *_ = str(metadata.get("thresholds chosen", "")).split(",")  # then follows the path of the images
        changed = f" since the thresholds were chosen anew, {goal}: `threshold` below is the run's" if goal else ""
        return f"Not measured{changed}."
    about = f"On {results['val_images']:,} evaluation images"
    if "val_groups" in results:
        about += f" in {results['val_groups']:,} groups, over which the intervals are"
    if "train_images" in results:
        about += f", after training on {results['train_images']:,}"
    if results.get("eval_split") == "validation":
        about += ", set aside of the training images to choose settings by"
    if "epoch" in results.get("chosen_by", {}):
        about += ", which chose the epoch: on others the figures are lower"
    rows = [f"{about}:", "", "| | | 95% interval |", "|---|---|---|"]
    for name, value, interval in figures:
        ends = "none" if interval is None else "{:.4g} to {:.4g}".format(*interval)
        rows.append(f"| {name} | {value:.4g} | {ends} |")
    score, *_ = figures[0]
    before = results.get(f"probe_{score}_before")
    if before is not None:
        rows.append(f"| {score} of the linear probe, before training | {before:.4g} | |")
    return "\n".join(rows)


def _by_name(task: parts.Task, results: Mapping[str, Any]) -> str:
    """A table of the figures of each class, label or number, where there are some."""
    by_name = results.get(task.outputs_are[1])
    for key in ("accuracy_per_class", "iou_per_class"):
        if key in results:
            by_name = {name: {key: value} for name, value in results[key].items()}
    if not isinstance(by_name, Mapping):
        return ""
    columns = [key for key in next(iter(by_name.values())) if not key.endswith("_interval")]
    lines = [f"| {task.outputs_are[0]} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, row in by_name.items():
        cells = ["" if row.get(key) is None else f"{row[key]:.4g}" for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n" + "\n".join(lines) + "\n"


def _data(metadata: Mapping[str, Any]) -> str:
    """The images of a run, by the name of their list or folder: a path says more than a stranger is to know."""
    places = value_at(metadata, "config/data/data_list")
    if not isinstance(places, list):
        place = value_at(metadata, "config/data/data_dir") or value_at(metadata, "config/data/dataset")
        places = [place or "unknown images"]
    return listed([Path(str(place)).name for place in places])
