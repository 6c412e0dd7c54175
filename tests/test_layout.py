"""The rooms: no import runs upwards, none in a circle, few run between them, each source file has its line in
CONTRIBUTING, and no line is packed. With `pip install -e .` code in another folder imports all of them."""

import ast
import functools
import re
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


@pytest.mark.parametrize("root, budget", [(None, (17, 22, 5)), ("tests", (17, 30, 5))], ids=["production", "tests"])
def test_few_lines_are_packed_and_no_conditional_expression_is_in_another(root, budget):
    """For 1,000 lines. Unpacking a call or a sequence is no tuple assignment."""
    lines = 0
    counts = Counter()
    for path in SOURCES.values() if root is None else (ROOT / root).glob("*.py"):
        lines += len(path.read_text().splitlines())
        for node in nodes(path):
            kind = type(node)
            if kind in (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp):
                counts["comprehensions"] += 1
            if kind is ast.Assign and type(node.value) is type(node.targets[0]) is ast.Tuple:
                counts["tuple assignments"] += 1
            if kind is ast.IfExp:
                counts["conditional expressions"] += 1
                assert sum(type(inner) is ast.IfExp for inner in ast.walk(node)) == 1, f"{path}:{node.lineno}"
    for what, most in zip(("conditional expressions", "comprehensions", "tuple assignments"), budget, strict=True):
        assert 1000 * counts[what] / lines <= most, what


# What `getattr` may ask with a default, by the module that asks: it is of others, whose things need not have it.
OF_OTHERS = {
    "backbones 'patch_embed'": "timm's networks",
    "backbones 'patch_size'": "timm's patch embeddings",
    "checkpoints 'patch_size'": "torchvision's networks",
    "checkpoints 'pos_embed'": "timm's networks",
    "transforms 'tag_v2'": "Pillow's images, by their format",
    "transforms 'filename'": "Pillow's images, if they are of a file",
    "runs 'mallopt'": "the C library",
    "runs 'signum'": "Python's KeyboardInterrupt, which the toolkit's own extends",
    "config name": "any dataclass, whose options are asked for by names that it need not have",
}
NAMED_TRUTHS = re.compile(r"use_\w+|in_4_bits|training")  # what begins with is_ may be a mask of many


def is_truth(node: ast.AST) -> bool:
    if isinstance(node, ast.Name | ast.Attribute):
        return NAMED_TRUTHS.fullmatch(ast.unparse(node).rpartition(".")[2]) is not None
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("bool", "isinstance", "hasattr", "any", "all")
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def hides_condition(node: ast.AST, module: str = "") -> bool:
    """Is it a product with a truth, a text times what may be one, an element by a truth, or a field by a default?"""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        factors = (node.left, node.right)
        has_text = any(map(is_text, factors))
        has_number = any(isinstance(f, ast.BinOp | ast.Constant) and not is_text(f) for f in factors)
        return any(map(is_truth, factors)) or (has_text and not has_number)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Tuple | ast.List):
        return isinstance(node.slice, ast.Name) or is_truth(node.slice)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Compare):  # `x[x > 0]` is no element
        return isinstance(node.slice.ops[0], ast.Is | ast.IsNot | ast.In | ast.NotIn)
    if isinstance(node, ast.Subscript):
        return is_truth(node.slice)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3:
        return f"{module} {ast.unparse(node.args[1])}" not in OF_OTHERS
    return False


@pytest.mark.parametrize(
    "text, hides",
    [(text, True) for text in ("'s' * (n > 1)", "f'{a}' * b", "p * self.training", "(a, b)[n > 1]", "(a, b)[c]")]
    + [(text, True) for text in ("x[a is b]", "x[not a]", "x[self.in_4_bits]", "x[bool(a)]", "getattr(args, 'a', 0)")]
    + [(text, False) for text in ("'-' * 26", "'-' * (n + 1)", "2 * n", "x[x > 0]", "x[n]", "(a, b)[0]", "{a: b}[c]")],
)
def test_what_hides_a_condition(text, hides):
    assert hides_condition(ast.parse(text, mode="eval").body) == hides


def test_a_condition_is_written_as_a_condition():
    hidden = []
    for path in SOURCES.values():
        hidden += [f"{path}:{node.lineno}" for node in nodes(path) if hides_condition(node, path.stem)]
    assert hidden == []


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
    told = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
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
