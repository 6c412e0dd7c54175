"""Write the tables of docs/options.md from the command lines' parsers: run it after a change to an option.

python docs/write_options.py
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune_lora
from moco import pretrain
from toolkit.config import shown_default

PAGE = Path(__file__).resolve().parent / "options.md"
MARK = "<!-- What follows is written by docs/write_options.py. -->\n"
SECTIONS = ("run", "model", "data", "finetune", "moco")  # the parsers' groups, which are the sections of the YAML file
FINE_TUNING = "## Fine-tuning: `python finetune_lora.py`"
PRETRAINING = """## Pretraining: `python -m moco.pretrain`

It shares some of the options above, with the same meaning and default. These are its own:"""


def page() -> str:
    """The whole page: its first part as it is, and the tables."""
    prose = PAGE.read_text().partition(MARK)[0]
    ours, theirs = rows(finetune_lora.make_parser()), rows(pretrain.make_parser())
    known = {row for section in ours.values() for row in section}
    others = {title: [row for row in section if row not in known] for title, section in theirs.items()}
    return f"{prose}{MARK}\n{FINE_TUNING}\n{tables(ours)}\n{PRETRAINING}\n{tables(others)}"


def rows(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """The options of each section, each as a row of a table."""
    groups = {group.title: group._group_actions for group in parser._action_groups}
    return {title: [row(action) for action in groups[title]] for title in SECTIONS if title in groups}


def row(action: argparse.Action) -> str:
    flags = " / ".join(f"`{flag}`" for flag in action.option_strings)
    choices = list(map(str, action.choices or []))
    meaning = action.help or ", ".join(choices)
    if any(choice not in meaning for choice in choices if choice != action.default):
        meaning += f" ({', '.join(choices)})"
    return f"| {flags} | {shown_default(action.default)} | {meaning} |"


def tables(sections: dict[str, list[str]]) -> str:
    text = ""
    for title, lines in sections.items():
        if lines:
            heading = "Only on the command line" if title == "run" else f"Section `{title}`"
            text += f"\n{heading}:\n\n| option | default | meaning |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
