"""The rooms: no import runs upwards, none in a circle, few run between them, each source file has its line in
CONTRIBUTING, and no line is packed. With `pip install -e .` code in another folder imports all of them."""

import ast
import functools
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.image_files import touch
from toolkit.choices import TRUTHS

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. The longest prefix of a module's name counts; what is not named stands on the top floor.
ROOMS = ("toolkit.models", "toolkit.images", "toolkit.answers", "toolkit.run")
FLOORS = ("moco_lora", "toolkit", *ROOMS, "lora", "lora_utils", "finetune_lora")
TOP_FLOOR = len(FLOORS)
HELP = {"finetune": "--data-dir", "deploy": "predict", "pretrain": "--moco-version"}

SOURCES = {}  # each module of the project by its dotted name; a package by its own name
for path in (*ROOT.glob("*.py"), *ROOT.glob("toolkit/**/*.py"), *ROOT.glob("lora/*.py"), *ROOT.glob("moco/*.py")):
    SOURCES[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path


def floor(module: str) -> int:
    """The number of the floor that a module stands on; 0 is the ground."""
    while module:
        if module in FLOORS:
            return FLOORS.index(module)
        module = module.rpartition(".")[0]
    return TOP_FLOOR


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imported(path: Path) -> set[str]:
    """The project's modules that a file imports, inside functions as well."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & SOURCES.keys()


def place(module: str) -> str:
    """A room of the toolkit, or a file of its ground or of another package."""
    return ".".join(module.split(".")[:2])


def test_no_import_runs_upwards_or_in_a_circle_and_few_between_the_rooms_of_the_toolkit_and_the_files_of_lora():
    """A circle raises CycleError. Counted are the pairs of places in a package of which one imports of the other."""
    order = TopologicalSorter({name: imported(path) for name, path in SOURCES.items()}).static_order()
    assert {floor(name) for name in order} == set(range(TOP_FLOOR + 1))
    pairs = defaultdict(set)
    for name, path in SOURCES.items():
        package = name.partition(".")[0]
        for other in imported(path):
            assert floor(other) <= floor(name), f"{name} imports {other}"
            if package != name and other.startswith(f"{package}.") and place(name) != place(other):
                pairs[package].add((place(name), place(other)))
    assert len(pairs["toolkit"]) <= 30 and len(pairs["lora"]) <= 25, pairs


def test_private_operators_of_pytorch_are_in_one_file_for_each_floor():
    """BatchNorms lie below the adapters."""
    found = {name for name, path in SOURCES.items() if "torch.ops" in path.read_text()}
    assert found == {"lora.backends", "toolkit.models.norms"}


def test_only_a_task_knows_its_name():
    """All else asks a task what it is like: so a new one needs no change elsewhere."""
    own = {SOURCES["toolkit.choices"], *(SOURCES[f"toolkit.answers.{kind}"] for kind in TRUTHS)}
    for path in {*SOURCES.values()} - own:
        for node in nodes(path):
            assert not isinstance(node, ast.Constant) or node.value not in (*TRUTHS,), f"{path}:{node.lineno}"


def test_few_lines_are_packed_and_no_conditional_expression_is_in_another():
    """Unpacking a call or a sequence is no tuple assignment."""
    lines = 0
    counts = Counter()
    for path in SOURCES.values():
        lines += len(path.read_text().splitlines())
        for node in nodes(path):
            kind = type(node)
            if kind in (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp):
                counts["comprehensions"] += 1
            if kind is ast.Assign and type(node.value) is type(node.targets[0]) is ast.Tuple:
                counts["tuple assignments"] += 1
            if kind is ast.IfExp:
                counts["conditional expressions"] += 1
                inside = sum(type(inner) is ast.IfExp for inner in ast.walk(node))
                assert inside == 1, f"{path}:{node.lineno}"
    for what, most in {"conditional expressions": 20, "comprehensions": 30, "tuple assignments": 5}.items():
        assert 1000 * counts[what] / lines <= most, what


ELSEWHERE = """
import pkgutil, site, sys
site.addsitedir(sys.argv[1])
import deploy_lora, example_lora_usage, finetune_lora, lora, lora_utils, moco, toolkit
for package in (lora, moco, toolkit):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        __import__(module.name)
from toolkit.models.checkpoints import load_backbone
model, report = load_backbone(finetune_lora.DEFAULT_CHECKPOINT, num_classes=2)
print(finetune_lora.DEFAULT_CHECKPOINT, report["arch"])
"""


def test_every_package_is_named_and_every_file_has_a_line_in_contributing():
    """What lies in a package that is not named would be missing in an installation."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = [path for path in SOURCES.values() if path.stem != "__init__" and "example" not in path.stem]
    assert [path for path in files if f"`{path.relative_to(ROOT)}`" not in text] == []
    tomllib = pytest.importorskip("tomllib")
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {*told["project"]["scripts"].values()} == {"moco_lora:start"}
    named = told["tool"]["setuptools"]
    assert {*named["packages"]} == {name for name, path in SOURCES.items() if path.stem == "__init__"}
    assert {*named["py-modules"]} == {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.slow
def test_code_in_another_folder_imports_everything(tmp_path):
    pytest.importorskip("setuptools", minversion="70.1")  # earlier ones build nothing without the package wheel
    checkout = tmp_path / "checkout"  # of its own: setuptools leaves its notes in the source folder
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "benchmarks", "tests", "*.ipynb"))
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", packages, "-e", checkout], check=True)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "lora").mkdir(parents=True)  # of adapters, and no package
    command = [sys.executable, "-c", ELSEWHERE, packages]
    done = subprocess.run(command, cwd=elsewhere, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(checkout / "checkpoints/moco_stage1/moco_stage1_epoch_100.pth"), "vit_mini"]
    assert {path.name for path in (packages / "bin").iterdir()} == {f"moco-lora-{name}" for name in HELP}


def test_a_package_of_the_users_in_the_way_is_named(tmp_path):
    for script, package in {"finetune_lora": "toolkit", "deploy_lora": "lora", "moco_lora": "moco"}.items():
        users = tmp_path / script
        touch(users, f"{package}/__init__.py")
        run = f"import sys; sys.path[:0] = {[str(users), str(ROOT)]}; import {script}"
        done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=tmp_path)
        told = f"ImportError: {users / package} is in the way of {ROOT / package}, which the toolkit imports: rename it"
        assert told in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", HELP)
def test_each_installed_command_is_its_script_and_a_folder_that_is_no_package_is_in_nobodys_way(name, tmp_path):
    (tmp_path / "toolkit").mkdir()
    run = f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]}; sys.argv = ['moco-lora-{name}', '--help']"
    run += "; import moco_lora; moco_lora.start()"
    done = subprocess.run([sys.executable, "-c", run], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert HELP[name] in done.stdout and "usage: python" not in done.stdout
