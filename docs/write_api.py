"""Write docs/api.md from the docstrings: run it after a change to one.

python docs/write_api.py
"""

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PAGE = Path(__file__).resolve().parent / "api.md"
SCRIPTS = ("finetune_lora", "lora_utils")  # all public names of these, in the order of the file
# Of the rest the names that docs/python.md imports.
IMPORTED = re.compile(r"^from ((?:lora|toolkit|moco)\.[\w.]+) import (.+)$", re.MULTILINE)
BEGINNING = """# Which functions and classes are there, with which arguments?

[README](../README.md) · before: [python](python.md) · next: [pretrain](pretrain.md)

Every public name of the two modules for loops of your own, and the names of the packages that [python](python.md)
imports: signatures, shapes and errors, as the code has them. `docs/write_api.py` writes this page from the docstrings.
"""


def page() -> str:
    """The whole page."""
    lines = [BEGINNING]
    for module, names in {name: public_names(importlib.import_module(name)) for name in SCRIPTS}.items():
        lines += [f"## `{module}`\n", *entries(module, names)]
    for module, names in imported().items():
        lines += [f"## `{module}`\n", *entries(module, names)]
    return "\n".join(lines)


def public_names(module: ModuleType) -> list[str]:
    """Its own functions and classes."""
    found = []
    for name, value in vars(module).items():
        is_its_own = getattr(value, "__module__", None) == module.__name__
        if is_its_own and value.__doc__ and not name.startswith("_"):
            found.append(name)
    return found


def imported() -> dict[str, list[str]]:
    """The names that docs/python.md imports from each module of the packages."""
    found: dict[str, list[str]] = {}
    for module, names in IMPORTED.findall((PAGE.parent / "python.md").read_text()):
        for name in names.split(", "):
            if name not in found.setdefault(module, []):
                found[module].append(name)
    return dict(sorted(found.items()))


def entries(module: str, names: list[str]) -> Iterator[str]:
    """A heading, the signature and the docstring of each name, and of a class's public methods."""
    for name in names:
        value = getattr(importlib.import_module(module), name)
        if not callable(value):
            continue
        yield f"### `{name}`\n"
        yield described(name, value)
        for method, function in methods(value):
            yield described(f"{name}.{method}", function)


def methods(value: Any) -> Iterator[tuple[str, Any]]:
    """The public methods that a class itself documents."""
    for name, member in vars(value).items() if inspect.isclass(value) else ():
        function = inspect.unwrap(getattr(member, "__func__", member))
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield name, function


def described(name: str, value: Any) -> str:
    """The signature, and the docstring below it."""
    return f"```text\n{signature(name, value)}\n\n{inspect.getdoc(value)}\n```\n"


def signature(name: str, value: Any) -> str:
    """`name(arguments) -> type`, on as many lines as it needs."""
    text = re.sub(r"(?:\w+\.)+(?=[A-Z]\w)", "", str(inspect.signature(value)))
    whole = re.sub(r" object at 0x\w+", "", f"{name}{text}")
    return textwrap.fill(whole, 110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page())
