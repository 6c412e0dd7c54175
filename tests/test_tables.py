"""benchmarks/tables.py: the results book and the figures that pages cite are what the runs' files have."""

import argparse
import functools
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import finetune_lora
from benchmarks import tables
from tests.pages import commands

BOOK = Path(tables.__file__).parent / "RESULTS.md"
LONGEST_BOOK = 300  # lines: who looks for a figure finds it in seconds


class Parsed(Exception):
    """A command's options were understood."""


@pytest.fixture
def parsers_stop(monkeypatch):
    """A script ends where it has read its options; what it passes on is understood by the runs that it starts."""
    real = argparse.ArgumentParser.parse_known_args

    def parse(parser, argv, namespace=None):
        _, passed_on = real(parser, argv, namespace)
        _, unknown = real(finetune_lora.make_parser(), passed_on)
        assert unknown == []
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)


def test_pages_have_the_figures_of_the_runs(monkeypatch):
    """After a change of the files: `python -m benchmarks.tables`."""
    monkeypatch.setattr(tables, "definitions", functools.cache(tables.definitions))
    monkeypatch.setattr(tables, "figures", functools.cache(tables.figures))
    for page in tables.PAGES:
        assert tables.rewritten(page.read_text()) == page.read_text(), page.name
    assert (tables.RESULTS / "figures.jsonl").read_text() == tables.index()
    assert len(BOOK.read_text().splitlines()) <= LONGEST_BOOK
    in_pages = re.findall(r"<!-- table: (\w+) -->", BOOK.read_text() + tables.PAGES[0].read_text())
    assert sorted(in_pages) == sorted(tables.definitions())  # each once, in the book or in README


def test_every_figure_names_its_ground():
    for line in (tables.RESULTS / "figures.jsonl").read_text().splitlines():
        figure = json.loads(line)
        assert figure["machine"] and figure["date"] and figure["commit"], figure["id"]
        assert figure["seeds"] == len(figure["values"]) >= 1


@pytest.mark.parametrize("command", [c for c in commands(BOOK.read_text()) if "pytest" not in c])
def test_every_command_of_the_book_is_understood(command, parsers_stop):
    words = [word for word in shlex.split(command, comments=True) if "=" not in word or word.startswith("-")]
    with pytest.raises(Parsed):
        if words[1] == "finetune_lora.py":
            finetune_lora.make_parser().parse_args(words[2:])
        importlib.import_module(words[2]).main(words[3:])


def test_a_cell_is_the_mean_over_its_seeds_or_the_median_of_its_rounds(tmp_path, monkeypatch):
    """By hand: two seeds of a method, three rounds of a ratio, a cell without a run, and a figure in a sentence."""
    runs = [
        {"method": "a", "acc": 0.5, "val": 40},
        {"method": "a", "acc": 0.75, "val": 40},
        {"method": "b", "acc": 0.1, "val": 40},
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    (tmp_path / "steps.json").write_text(json.dumps({"variants": {"x": {"faster": [1.0, 4.0, 2.0]}}}))
    (tmp_path / "tables.yaml").write_text("""
small:
  {title: t, machine: m, date: 2026-01-02, commit: c, file: runs.jsonl, columns: {
    score: {of: acc, as: percent}, speed: {of: faster, as: ratio, file: steps.json, at: variants/x}},
    rows: {A: {score: {where: {method: a}}}, B: {score: {where: {method: b}}, speed: null}}}
""")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.written("small") == (
        "| t (m, 2026-01-02, c) | score | speed |\n|---|---|---|\n"
        "| A | 62.5% (50.0, 75.0) | 2.00x (1.50 to 3.00) |\n| B | 10.0% |  |\n"
    )
    cited = "from **9%**<!-- small.a.score --> to (9x<!-- small.a.speed -->)"
    assert tables.rewritten(cited) == "from **62.5%**<!-- small.a.score --> to (2.00x<!-- small.a.speed -->)"
    assert json.loads(tables.index().splitlines()[0])["images"] == 40
    (tmp_path / "runs.jsonl").write_text(json.dumps(runs[2]))
    with pytest.raises(ValueError, match=r"runs\.jsonl has no run with \{'method': 'a'\}"):
        tables.written("small")
