"""A fine-tuning run as one web page, `report.html`: all is in the file, so a browser shows it without a network."""

import base64
import html
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from toolkit.answers.evaluation import Evaluation
from toolkit.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr { border-top: 1px solid #eee; }
img { max-width: 100%; } pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; }
.wide { overflow: auto; max-height: 90vh; border: 1px solid #ddd; }
"""
BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart with every kind of colour vision (Okabe and Ito)
CONFUSIONS = 15  # rows in the table of what is taken for what


def write_page(
    path: Path,
    title: str,
    rows: Sequence[tuple[str, str]],
    sections: Sequence[str],
    adapter: Path,
    mistakes: Path,
    curves: Path | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Write the page of a run, or of an evaluation, which has no curves and no settings.

    Args:
        rows: the table that is printed, (name, value) each.
        sections: what the page shows of the answers, in HTML.
        adapter: the file that gave them.
        mistakes, curves: pictures.
    """
    adapter = shlex.quote(str(adapter))
    commands = [
        f"python deploy_lora.py evaluate {adapter}",
        f"python deploy_lora.py predict {adapter} new_images --output predictions.csv",
        f"python deploy_lora.py merge {adapter} --output merged.pth",
        f"python deploy_lora.py export {adapter} --output model.onnx",
    ]
    settings = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    parts = [
        f"<h1>{title}</h1>",
        html_table(rows),
        *(["<h2>By epoch</h2>", html_picture(curves.read_bytes(), "losses and accuracy by epoch")] if curves else []),
        *sections,
        "<h2>Mistakes</h2>",
        html_picture(mistakes.read_bytes(), "the most confident wrong answers, and the least certain right ones"),
        "<h2>To go on</h2>",
        f"<pre>{html.escape(chr(10).join(commands))}</pre>",
        f"<details><summary>Settings</summary><pre>{html.escape(settings)}</pre></details>" if config else "",
    ]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    # A folder's name may have bytes that are no character.
    write_text(page.encode("utf-8", "replace").decode(), path)


def class_sections(result: Evaluation, class_names: Sequence[str]) -> list[str]:
    """What is taken for what, and the classes."""
    counts = confusion_counts(result, len(class_names))
    return [
        "<h2>What is taken for what</h2>",
        "<p>A row is a true class, a column an answer; the mouse over a field tells both and the number of images. "
        "Right answers are blue, wrong ones orange, the darker the larger their share of the row.</p>",
        f'<div class="wide">{confusion_svg(counts, class_names)}</div>',
        html_table(_confusions(counts, class_names), ("true class", "taken for", "images", "of the class")),
        "<h2>By class</h2>",
        html_table(by_class(counts, class_names), ("class", "images", "right", "share")),
    ]


def confusion_counts(result: Evaluation, classes: int) -> Tensor:
    """How many images of each true class (row) got each answer (column): (classes, classes)."""
    return torch.bincount(result.labels * classes + result.predictions, minlength=classes**2).view(classes, classes)


def confusion_svg(counts: Tensor, class_names: Sequence[str]) -> str:
    """The counts as a drawing with the name of each class, in which a browser can search; for hundreds of classes too.

    Only fields with images are drawn, so its size grows with the images and not with the square of the classes.
    """
    classes = len(class_names)
    side = 22 if classes <= 40 else 12  # pixels of a field
    side = 34 if classes <= 12 else side
    letters = min(13, side - 2)  # pixels
    names = [html.escape(name if len(name) <= 24 else f"{name[:23]}…") for name in class_names]
    margin = round(0.62 * letters * min(24, max(map(len, class_names)))) + 8  # pixels, for the names
    parts = []
    for row, column in counts.nonzero().tolist():
        count, total = int(counts[row, column]), int(counts[row].sum())
        told = f"{class_names[row]}: {count} of {total} taken for {class_names[column]}"
        x, y = margin + column * side, margin + row * side
        parts.append(_field(x, y, side, count / total, row == column, told))
        if side > 20:
            white = ' fill="white"' if count / total > 0.5 else ""
            middle = f'x="{x + side // 2}" y="{y + side // 2 + letters // 3}" text-anchor="middle"'
            parts.append(f'<text {middle} pointer-events="none"{white}>{count}</text>')
    for i, name in enumerate(names):
        middle = margin + i * side + side // 2 + letters // 3
        parts.append(f'<text x="{margin - 5}" y="{middle}" text-anchor="end">{name}</text>')
        parts.append(f'<text transform="translate({middle} {margin - 5}) rotate(-90)">{name}</text>')
    frame = f'x="{margin}" y="{margin}" width="{classes * side}" height="{classes * side}"'
    parts.append(f'<rect {frame} fill="none" stroke="#999" pointer-events="none"/>')
    whole = margin + classes * side + 4
    return f'<svg width="{whole}" height="{whole}" font-size="{letters}">{"".join(parts)}</svg>'


def _field(x: int, y: int, side: int, share: float, right: bool, told: str) -> str:
    colour = f'fill="{BLUE if right else ORANGE}" fill-opacity="{0.15 + 0.85 * share:.2f}"'
    title = f"<title>{html.escape(told)}</title>"
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" {colour}>{title}</rect>'


def _confusions(counts: Tensor, class_names: Sequence[str]) -> list[tuple]:
    """The most frequent wrong answers: (true class, answer, images, share of the class)."""
    found = counts.nonzero()  # not all pairs: they are the square of the classes
    wrong = found[found[:, 0] != found[:, 1]]
    places = wrong[counts[tuple(wrong.T)].argsort(descending=True, stable=True)[:CONFUSIONS]].tolist()
    totals = counts.sum(1).tolist()
    return [
        (class_names[row], class_names[column], int(counts[row, column]), f"{counts[row, column] / totals[row]:.1%}")
        for row, column in places
    ]


def by_class(counts: Tensor, class_names: Sequence[str]) -> list[tuple]:
    """(class, images, right answers, their share), the worst first; classes without images last."""
    totals, hits = counts.sum(1).tolist(), counts.diagonal().tolist()
    shares = [hit / total if total else 2.0 for hit, total in zip(hits, totals, strict=True)]
    order = sorted(range(len(class_names)), key=lambda i: shares[i])
    return [(class_names[i], totals[i], hits[i], f"{shares[i]:.1%}" if totals[i] else "no images") for i in order]


def html_table(rows: Iterable[Sequence[Any]], titles: Sequence[str] = ()) -> str:
    """An HTML table. Under titles, columns of numbers stand to the right."""

    def cells(kind: str, values: Sequence[Any]) -> str:
        marked = ((' class="number"' if titles and i > 0 and numeric[i] else "", v) for i, v in enumerate(values))
        return "".join(f"<{kind}{mark}>{html.escape(str(value))}</{kind}>" for mark, value in marked)

    rows = list(rows)
    numeric = [all(isinstance(row[i], int) or str(row[i]).endswith("%") for row in rows) for i in range(len(titles))]
    lines = [cells("th", titles)] if titles else []
    return (
        "<table>" + "".join(f"<tr>{line}</tr>" for line in [*lines, *(cells("td", row) for row in rows)]) + "</table>"
    )


def drawn(text: str) -> str:
    """The text as matplotlib draws it literally: with no formulas between dollars, nor bytes that are no character."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def html_picture(png: bytes, described: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{described}" src="data:image/png;base64,{data}">'
