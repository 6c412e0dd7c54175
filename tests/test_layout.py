"""The rooms: imports run one way, and each source file has its tests."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {path.stem: path for path in ROOT.glob("*.py")} | {
    f"moco.{path.stem}": path for path in ROOT.glob("moco/*.py") if path.stem != "__init__"
}
MAIN_SCRIPT_LINES = 1_200


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports, inside functions as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & SOURCES.keys()


def test_imports_run_one_way():
    """A circle raises CycleError; a file that imports itself is one as well."""
    order = list(TopologicalSorter({name: imported(path) for name, path in SOURCES.items()}).static_order())
    assert order.index("moco.training") < order.index("finetune_lora") < order.index("deploy_lora")
    assert order.index("finetune_lora") < order.index("moco.pretrain")


def test_of_stage_1_only_the_script_that_nothing_imports_knows_the_adapters():
    below = [path for path in ROOT.glob("moco/*.py") if path.name != "pretrain.py"]
    assert not any(name.startswith(("lora_", "finetune_lora")) for path in below for name in imported(path))
    assert [name for name, path in SOURCES.items() if "moco.pretrain" in imported(path)] == []


def test_the_main_script_can_be_read_in_one_sitting():
    assert len((ROOT / "finetune_lora.py").read_text().splitlines()) <= MAIN_SCRIPT_LINES


def test_contributing_has_a_line_for_every_file():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert [
        path for path in SOURCES.values() if f"`{path.relative_to(ROOT)}`" not in text and "example" not in path.stem
    ] == []
