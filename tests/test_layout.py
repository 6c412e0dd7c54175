"""The rooms: no import runs upwards, none in a circle, and each source file has its line in CONTRIBUTING."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("toolkit", "lora", "moco")
# From the ground up. The longest prefix of a module's name counts; what is not named stands on the top floor.
FLOORS = (
    "toolkit",
    "toolkit.models",
    "toolkit.images",
    "toolkit.answers",
    "toolkit.run",
    "lora",
    "lora_utils",
    "finetune_lora",
)
TOP_FLOOR = len(FLOORS)


def sources() -> dict[str, Path]:
    """Each module of the project by its dotted name; a package by its own name."""
    paths = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths, strict=True))


SOURCES = sources()


def floor(module: str) -> int:
    """The number of the floor that a module stands on; 0 is the ground."""
    while module:
        if module in FLOORS:
            return FLOORS.index(module)
        module = module.rpartition(".")[0]
    return TOP_FLOOR


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports, inside functions as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & SOURCES.keys()


def test_no_import_runs_upwards():
    upwards = [
        f"{name} imports {other}"
        for name, path in SOURCES.items()
        for other in imported(path)
        if floor(other) > floor(name)
    ]
    assert upwards == []


def test_imports_form_no_circle():
    """A circle raises CycleError; a file that imports itself is one as well."""
    TopologicalSorter({name: imported(path) for name, path in SOURCES.items()}).prepare()


def test_private_operators_of_pytorch_are_in_one_file():
    assert [name for name, path in SOURCES.items() if "torch.ops" in path.read_text()] == ["lora.backends"]


def test_each_package_is_found():
    assert {floor(name) for name in SOURCES} == set(range(TOP_FLOOR + 1))
    assert {"toolkit", "toolkit.devices", "toolkit.run.options", "lora.fusion", "moco.builder"} <= SOURCES.keys()


def test_contributing_has_a_line_for_every_file():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = [path for path in SOURCES.values() if path.stem != "__init__" and "example" not in path.stem]
    assert [path for path in files if f"`{path.relative_to(ROOT)}`" not in text] == []
