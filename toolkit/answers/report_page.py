"""A fine-tuning run as one web page, `report.html`: all is in the file, so a browser shows it without a network."""

import base64
import html
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from toolkit import MADE_BY, files
from toolkit.images import data, transforms

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } .titled :not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr { border-top: 1px solid #eee; } table:not(.titled) td:first-child { min-width: 10.5rem; }
figure { display: inline-block; width: 128px; margin: .4rem; font-size: .8rem; vertical-align: top; }
figure img { width: 100%; } figcaption { overflow-wrap: anywhere; }
img { max-width: 100%; } pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; }
"""
BLUE = "#0072B2"  # with orange, distinct for every kind of colour vision (Okabe and Ito)
ORANGE = "#D55E00"
SIDE = 128  # pixels at the most of small pictures, of which fifty are less than a megabyte, whatever is on them
# For axes that hold a picture. Ticks that are hidden, as `axis("off")` does, are laid out and take half of the time.
PICTURE_ALONE = {"xticks": [], "yticks": [], "frame_on": False}


def write_page(path: Path, title: str, rows, sections, mistakes: Path, named, curves=None, config=None) -> None:
    """Write the page of a run, or of an evaluation, which has no curves and no settings. The sections are HTML."""
    parts = [html_table(rows)]
    if curves is not None:
        parts += ["<h2>By epoch</h2>", html_picture(curves.read_bytes(), "losses and accuracy by epoch")]
    parts += sections
    parts += ["<h2>Mistakes</h2>", html_picture(mistakes.read_bytes(), "the images that were answered worst")]
    if named:  # the images on that picture, and what is said of each
        parts.append(f"<details><summary>The files</summary>{html_table(named)}</details>")
    if config is not None:
        settings = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        parts.append(f"<details><summary>Settings</summary><pre>{html.escape(settings)}</pre></details>")
    write_html(path, title, parts)


def write_html(path: Path, title: str, parts: Sequence[str]) -> None:
    head = f'<meta charset="utf-8"><meta name="generator" content="{MADE_BY}">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    # A folder's name may have bytes that are no character.
    files.write_text(page.encode("utf-8", "replace").decode(), path)


def html_table(rows: Sequence[Sequence[Any]], titles: Sequence[str] = ()) -> str:
    """An HTML table. Under titles, all columns but the first stand to the right: most are numbers."""

    def line(kind: str, cells: Sequence[Any]) -> str:
        found = [f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in cells]
        return f"<tr>{''.join(found)}</tr>"

    body = "".join(map(partial(line, "td"), rows))
    return f'<table class="titled">{line("th", titles)}{body}</table>' if titles else f"<table>{body}</table>"


def drawn(text: str, longest: int | None = None) -> str:
    """The text as matplotlib draws it literally, without formulas between dollars; of a long one its end."""
    if longest is not None and len(text) > longest:
        text = f"...{text[3 - longest :]}"
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def new_figure(width: float, height: float):
    """An empty figure of matplotlib, in inches. To import that takes a second, which no loading process shall wait."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def save_figure(figure, path: Path) -> None:
    with files.open_atomically(path) as file:
        figure.savefig(file, pil_kwargs={"compress_level": 3})  # a tenth larger, in two fifths of the time


def html_picture(content: bytes, described: str, kind: str = "png") -> str:
    return f'<img alt="{described}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def small_picture(images: data.LabelledImages, i: int, side: int) -> Image.Image | np.ndarray:
    """A picture of an image, `side` pixels along its shorter side, as matplotlib takes it."""
    # To show a large photograph from its every pixel takes long.
    shrunk = transforms.View(partial(transforms.whole_along, side, enlarges=False))(images.undecoded(i)[0])
    return images.bands.picture(shrunk) if torch.is_tensor(shrunk) else shrunk


def html_pictures(images: data.LabelledImages, shown: Sequence[tuple[int, str]]) -> str:
    """Small pictures of images, and under each what is said of it: (image, text)."""
    figures = []
    for i, text in shown:
        picture = small_picture(images, i, SIDE)
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray((255 * picture).astype(np.uint8))
        picture.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        picture.save(file, "JPEG")
        said = html.escape(text)
        figures.append(f"<figure>{html_picture(file.getvalue(), said, 'jpeg')}<figcaption>{said}</figcaption></figure>")
    return "\n".join(figures)
