"""Write the tables of the results book, and the figures that other pages cite, from the files of the runs.

    python -m benchmarks.tables            # every table of RESULTS.md, every cited figure, and results/figures.jsonl
    python -m benchmarks.tables ranks      # print one table

`results/tables.yaml` says where each cell comes from. A page has a table between two marks, and a figure before one:

    <!-- table: ranks -->  ...  <!-- end -->
    LoRA ends at 79.5%<!-- ranks.clothes-lite0.r-8 -->

What is `in_sentences` is cited alone, and no table of a page.
"""

import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", Path(__file__).parent / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CITED = re.compile(r"[^\s|(*]+(\**)<!-- ([\w-]+(?:\.[\w-]+){2}) -->")
SETTINGS = ("machine", "date", "commit")  # of a table, for the index


class Figure(NamedTuple):
    """What the runs of a cell have, and how it is written."""

    value: float
    values: list[float]  # of each seed or round
    images: int | None  # that were evaluated
    style: str

    def short(self) -> str:
        """The figure alone, as a sentence cites it."""
        return STYLES[self.style](self.value)

    def long(self) -> str:
        """With what it is the mean or the median of, as a table has it."""
        if len(set(self.values)) == 1:
            return self.short()
        if self.style == "ratio":
            low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
            return f"{self.short()} ({low:.2f} to {high:.2f})"
        if self.style == "gain":
            return f"{self.short()} ± {100 * statistics.stdev(self.values) / len(self.values) ** 0.5:.1f}"
        if self.style == "percent":
            return f"{self.short()} ({', '.join(STYLES[self.style](each).rstrip('%') for each in self.values)})"
        return self.short()


STYLES = {
    "percent": lambda value: f"{100 * value:.1f}%",
    "points": lambda value: f"{100 * value:.1f}",
    "gain": lambda value: f"{100 * value:+.1f}",
    "ratio": lambda value: f"{value:.2f}x",
    "share": lambda value: f"{value:.2f}",
    "seconds": lambda value: f"{value:.0f} s",
    "rounded": lambda value: f"{value:.1f}",
    "precise_seconds": lambda value: f"{value:.2f} s",
    "megabytes": lambda value: f"{value / 1e6:,.0f} MB",
    "milliseconds": lambda value: f"{value:.1f} ms",
    "count": lambda value: f"{value:,.0f}",
    "rate": lambda value: f"{value:.0e}".replace("e-0", "e-"),
    "percent_alone": lambda value: f"{100 * value:.1f}%",
}


def definitions() -> dict[str, Any]:
    """What `tables.yaml` says, by the name of the table."""
    return yaml.safe_load((RESULTS / "tables.yaml").read_text())


def cells(table: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure | None]]:
    """Each row's and column's title of a table, and the figure that is there, if any."""
    for row, of_row in table["rows"].items():
        for column, of_column in table["columns"].items():
            own = of_row.get(column, {})
            if own is None:
                yield row, column, None
                continue
            yield row, column, _figure({**table, **of_column, **of_row, **own}, _conditions(of_column, of_row, own))


def _conditions(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """What the rows of a log must have: of a column, a row and a cell together."""
    together: dict[str, Any] = {}
    for part in parts:
        together |= part.get("where", {})
    return together


def _figure(cell: Mapping[str, Any], where: Mapping[str, Any]) -> Figure:
    values, images = _values(cell, where)
    if "over" in cell:  # in pairs, draw by draw
        base = {**cell, **cell["over"]}
        others, _ = _values(base, {**where, **cell["over"].get("where", {})})
        values = [value - other for value, other in zip(values, others, strict=True)]
    middle = statistics.mean(values)
    if cell["as"] == "ratio":
        middle = statistics.median(values)
    return Figure(middle, values, images, cell["as"])


def _values(cell: Mapping[str, Any], where: Mapping[str, Any]) -> tuple[list[float], int | None]:
    """What a cell asks for, of each of its runs, and how many images these evaluated."""
    path = RESULTS / cell["file"]
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        records = value_at(json.loads(path.read_text()), cell.get("at"))
        if isinstance(records, dict):
            records = [records]
    found = [record for record in records if all(_is(record, key, wanted) for key, wanted in where.items())]
    if not found:
        raise ValueError(f"{cell['file']} has no run with {dict(where)}")
    values: list[float] = []
    for record in found:
        value = value_at(record, cell["of"])
        values += value if isinstance(value, list) else [value]
    return values, found[0].get("val")


def _is(record: Mapping[str, Any], key: str, wanted: Any) -> bool:
    return str(value_at(record, key)) == str(wanted)


def value_at(content: Any, path: str | None) -> Any:
    """What lies in nested dictionaries and lists at a path such as `variants/lora` or `run/0`, or None."""
    for key in filter(None, (path or "").split("/")):
        if content is None:
            break
        content = content[int(key)] if isinstance(content, list) else content.get(key)
    return content


def identifier(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def figures() -> dict[str, tuple[Figure, dict[str, Any]]]:
    """Every figure of every table, by table.row.column, with its line in the index."""
    found = {}
    for name, table in definitions().items():
        for row, column, figure in cells(table):
            if figure is None:
                continue
            key = f"{name}.{identifier(row)}.{identifier(column)}"
            line = {"id": key, "what": f"{table['title']}: {row}, {column}", "value": figure.value}
            line |= {"values": figure.values, "seeds": len(figure.values), "images": figure.images}
            line |= {setting: str(table[setting]) for setting in SETTINGS}
            found[key] = (figure, line)
    return found


def written(name: str) -> str:
    """A table in Markdown."""
    table = definitions()[name]
    about = ", ".join(str(table[setting]) for setting in SETTINGS)
    lines = ["| " + " | ".join([f"{table['title']} ({about})", *table["columns"]]) + " |"]
    lines.append("|---" * (1 + len(table["columns"])) + "|")
    rows: dict[str, list[str]] = {}
    for row, _, figure in cells(table):
        rows.setdefault(row, []).append("" if figure is None else figure.long())
    for row, texts in rows.items():
        lines.append("| " + " | ".join([row, *texts]) + " |")
    return "\n".join([*lines, ""])


def rewritten(text: str) -> str:
    """A page with its tables and cited figures as the runs have them."""
    known = figures()
    text = TABLE.sub(lambda found: found[1] + written(found[2]) + found[3], text)
    return CITED.sub(lambda found: f"{known[found[2]][0].short()}{found[1]}<!-- {found[2]} -->", text)


def index() -> str:
    """The content of `figures.jsonl`: a line for each figure."""
    return "".join(json.dumps(line) + "\n" for _, line in figures().values())


def main(names: list[str]) -> None:
    for name in names:
        print(written(name))
    if not names:
        (RESULTS / "figures.jsonl").write_text(index())
        for page in PAGES:
            page.write_text(rewritten(page.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
