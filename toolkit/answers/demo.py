"""A page on which an image is dropped and answered, by gradio, and the files of a Space of the Hugging Face Hub."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from toolkit import TOOLKIT, InputError, faults_named, files, listed, optional_package
from toolkit.answers import heat_maps, parts, predictions, report_page
from toolkit.images import folders, masks, scenes

GRADIO = "6.31.0"  # the release that a Space runs, which the page was tried with
LARGEST = 1_000  # pixels along a side of a picture on the page
# What a Space needs of the toolkit; `moco` because `moco_lora` looks for it.
PACKAGES = ("toolkit", "lora", "moco")
FILES = ("deploy_lora.py", "finetune_lora.py", "lora_utils.py", "moco_lora.py", "requirements.txt", "LICENSE")
APP = '''"""The page of a Space; `python app.py` shows it here."""

import deploy_lora

deploy_lora.main({words})
'''


@dataclass
class Demo:
    task: parts.Task
    explainer: heat_maps.Explainer
    maps: predictions.Maps | None  # of a class for every pixel

    def answer(self, path: str | Path, of: int | None = None) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
        """What `predict` says of an image, in rows; the image, under its mask if it has one; and the heat map.

        The heat map is that of the output with the number `of`; None: the answer, of masks the most frequent class.
        Both pictures are (H, W, 3) of uint8. Raises InputError for a file that is no such image.
        """
        bands = self.explainer.bands
        image = folders.ImageFiles("", [str(path)], bands)[0]
        if self.maps is None:
            picture, heat, outputs = self.explainer.explain(image, of)
            columns, [cells] = self.task.table(outputs)
            if self.task.counts_images:  # the table has a class, its probability, the next class, and so on
                columns, cells = cells[::2], cells[1::2]
            return list(zip(columns, cells, strict=True)), _levels(picture), _levels(heat)
        names = self.task.names
        with scenes.open_scene(path, bands) as scene:
            classes = np.concatenate(list(self.maps.parts(scene)))
            step = 1 + max(classes.shape) // LARGEST
            picture = scene.rows(0, scene.height)[::step, ::step]
        shares = np.bincount(classes.flat, minlength=len(names)) / classes.size
        if of is None:
            of = int(shares.argmax())
        picture = picture / 255 if bands is None else bands.picture(torch.from_numpy(picture).movedim(2, 0))
        mask = masks.coloured(torch.from_numpy(classes[::step, ::step]), self.task.palette())
        _, heat, _ = self.explainer.explain(image, of)
        rows = [(name, f"{share:.1%} of the pixels") for name, share in zip(names, shares, strict=True)]
        return rows, _levels(0.4 * picture + 0.6 * mask), _levels(heat)

    def table(self, rows: list[tuple[str, str]]) -> str:
        """The rows in HTML, each class of a mask with its colour."""
        table = report_page.html_table(rows)
        if self.maps is not None:
            for colour in _levels(self.task.palette()).tolist():
                table = table.replace("<tr><td>", f'<tr><td style="border-left: 1em solid rgb{tuple(colour)}">', 1)
        return table

    def page(self, title: str) -> Any:
        """The page, a `gradio.Interface`, which is yet to be launched. What is dropped on it is deleted at its end."""
        gradio = optional_package("gradio", "demo")

        def shown(path: str | None, of: int | None) -> tuple[str, list]:
            if path is None:
                return "", []
            try:
                rows, picture, heat = self.answer(path, of)
            except InputError as error:
                raise gradio.Error(error.problem.replace(path, Path(path).name)) from None
            return self.table(rows), [(picture, "the image"), (heat, "what spoke for it")]

        dropped = gradio.File(label="image", type="filepath")
        explained = gradio.Dropdown(self.task.names, type="index", value=None, label="heat map of (empty: the answer)")
        answers = [gradio.HTML(), gradio.Gallery(columns=2, object_fit="contain", format="png", show_label=False)]
        settings = {"live": True, "flagging_mode": "never", "analytics_enabled": False, "delete_cache": (3600, 3600)}
        return gradio.Interface(shown, [dropped, explained], answers, title=title, **settings)


def _levels(picture: np.ndarray) -> np.ndarray:
    return np.round(255 * picture).astype(np.uint8)


def write_space(
    folder: Path, adapter: Path, base: Path, stage1: Path | None, metadata: Mapping[str, Any], options: Sequence[str]
) -> None:
    """Write a Space, a folder: an adapter's page by `options` of demo, the toolkit, and its base if that is a file."""
    needed = [adapter, *filter(None, [stage1])]
    words = ["demo", adapter.name, *options]
    if base.is_file():
        needed.append(base)
        words += ["--checkpoint", base.name]
    if len({path.name for path in needed}) < len(needed):
        raise InputError(f"{listed(needed)}: in a Space two of them would have one name; rename one")
    with faults_named(folder):
        folder.mkdir(parents=True)  # a new one
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(TOOLKIT / name, folder / name, ignore=ignored, copy_function=_copy)
    for path in (*needed, *map(TOOLKIT.joinpath, FILES)):
        _copy(path, folder / path.name)
    requirements = (TOOLKIT / "requirements.txt").read_text() + "gradio>=6\n"
    if str(metadata["arch"]).startswith("timm:"):
        requirements += "timm>=1.0\n"
    files.write_text(requirements, folder / "requirements.txt")
    files.write_text(APP.format(words=words), folder / "app.py")
    head = {"title": adapter.resolve().parent.name, "sdk": "gradio", "sdk_version": GRADIO, "app_file": "app.py"}
    what = f"Drop an image, and `{adapter.name}` answers: {listed(metadata['class_names'], 30)}."
    files.write_text(f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{what}\n", folder / "README.md")


def _copy(path: str | Path, copy: str | Path) -> None:
    with open(path, "rb") as content, files.open_atomically(copy) as file:  # which names a disk that is full
        shutil.copyfileobj(content, file)
