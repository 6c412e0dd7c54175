"""What both training loops share: options, stopping and faults, seeding, device, precision, schedule, k-NN accuracy."""

import argparse
import contextlib
import copy
import difflib
import math
import os
import random
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.utils.data import DataLoader

from moco import InputError, distributed, printable
from moco.backbones import forward_features

# One file configures both scripts. Each passes over the other's section, and here, by section that both read, are the
# keys that only fine-tuning has.
SECTIONS = {
    "model": ("checkpoint", "from_scratch"),
    "data": ("labels_per_class", "augmentation"),
    "moco": (),
    "finetune": (),
}

# ----------------------------------------------------------------------------------------------------------------------
# Option values: argparse `type=` functions, used for flags and YAML values alike


# What tensors, loaders and generators can take, and what stays finite when float32 multiplies a few of them.
LARGEST = {int: 2**31 - 1, float: 1_000_000}


def _number(kind: type, accepts: Callable[[float], bool], expected: str) -> Callable[[str], Any]:
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (abs(value) < math.inf and accepts(value)):  # refuses nan too
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{printable(text)}'")
        if value > LARGEST[kind]:
            raise argparse.ArgumentTypeError(f"{printable(text)} is too large; the largest is {LARGEST[kind]}")
        return value

    return convert


positive_int = _number(int, lambda x: x > 0, "a whole number above 0")
non_negative_int = _number(int, lambda x: x >= 0, "a whole number, 0 or more")
positive_float = _number(float, lambda x: x > 0, "a number above 0")
non_negative_float = _number(float, lambda x: x >= 0, "a number, 0 or more")
worker_count = _number(int, lambda x: 0 <= x <= 256, "a whole number from 0 to 256")
fraction = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")


def boolean(text: str) -> bool:
    """`true` or `false`, as YAML writes them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


# ----------------------------------------------------------------------------------------------------------------------
# Options: defaults < YAML < command line


def parse_args(
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
    default_config: Path | None = None,
    default_config_applies: Callable[[dict[str, Any]], bool] | None = None,
    check: Callable[[argparse.Namespace, dict[str, str]], Iterable[str]] | None = None,
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Options from defaults, then a YAML file, then the command line; the parser is the schema of all three.

    An argument group titled `model`, `data`, `moco` or `finetune` is the YAML section of that name, its options' names
    (`dest`) are the keys. Options in other groups are for the command line only.

    Args:
        parser: has `--config`.
        argv: the command line, `sys.argv[1:]` when None.
        default_config: the YAML file used when the command line names none.
        default_config_applies: is given what the command line says (unconverted, by `dest`) and answers whether
            `default_config` suits it. None: always.
        check: is given what is returned and may complete it; answers what is wrong with the options together. An option
            whose own value is wrong has its default there.

    Returns:
        The options (`config` is the path of the file used, or None) and, for every option, where its value came
        from: 'default', 'config' or 'command line'.

    Raises:
        InputError: one message with every problem of both the command line and the file, one per line.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    typed, problems = _read_command_line(parser, argv)
    values, sources = {}, dict.fromkeys(actions, "default")
    for dest, action in actions.items():
        default = action.default
        values[dest] = action.type(default) if isinstance(default, str) and action.type else default

    def take(dest: str, value: Any, source: str, name: str) -> None:
        try:
            values[dest], sources[dest] = _convert(actions[dest], value), source
        except (argparse.ArgumentTypeError, ValueError) as error:
            problems.append(f"{name}: {error}")

    if "config" in typed:
        take("config", typed.pop("config"), "command line", "--config")
    elif default_config and (not default_config_applies or default_config_applies(typed)):
        values["config"] = default_config
    if values["config"] is not None:
        for section, dest, value in _read_config(parser, Path(values["config"]), problems):
            take(dest, value, "config", f"{section}.{dest}")
    for dest, value in typed.items():
        take(dest, value, "command line", actions[dest].option_strings[0])
    args = argparse.Namespace(**values)
    problems += check(args, sources) if check else []
    if problems:
        raise InputError("\n".join(problems))
    return args, sources


def _read_command_line(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[dict[str, Any], list[str]]:
    """What was typed, unconverted, and what is wrong with its names. argparse alone would stop at the first problem."""
    lenient = copy.deepcopy(parser)
    lenient.allow_abbrev = False
    lenient.print_help = parser.print_help
    lenient.error = _raise_input_error
    lenient._negative_number_matcher = re.compile(r"-[\d.]")  # argparse's own takes -1e-3 for an option
    for action in lenient._actions:
        action.default, action.type, action.choices = argparse.SUPPRESS, None, None
        if action.nargs is None:
            action.nargs, action.const = "?", ""  # `--epochs` without its value, which _convert_one refuses
        elif action.nargs == "+":
            action.nargs = "*"
    words = list(sys.argv[1:] if argv is None else argv)
    switches = [flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings]
    valued = [word for word in words if "=" in word and word.split("=")[0] in switches]
    typed, rest = lenient.parse_known_args([word for word in words if word not in valued])
    problems = [f"{printable(word)}: write {word.split('=')[0]} alone; it takes no value" for word in valued]
    return vars(typed), problems + unknown_words(parser, rest)


def unknown_words(parser: argparse.ArgumentParser, rest: list[str]) -> list[str]:
    """What is wrong with the words that `parse_known_args` left over."""
    problems, known = [], [flag for action in parser._actions for flag in action.option_strings]
    for before, word in zip(["", *rest], rest, strict=False):
        if word.startswith("-"):
            problems.append(f"{printable(word)}: no such option{_nearest(word.split('=')[0], known)}; see --help")
        elif not before.startswith("-"):  # a word after an unknown option is most likely its value
            problems.append(f"{printable(word)}: unexpected argument; see --help")
    return problems


def _raise_input_error(message: str) -> None:
    raise InputError(message)


LONGEST_CONFIG = 100_000  # characters; PyYAML takes a second for them


class _ConfigLoader(yaml.SafeLoader):
    """YAML of plain values: no tag that builds objects, no key twice (the first would be lost without a word), and no
    aliases, with which a page of text unfolds to gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            self._refuse("aliases are not read; write the value out", self.peek_event())
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            twice = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).most_common(1)
            self._refuse(f"the key {twice[0][0] if twice else node.value[0][0].value} is there twice", node)
        return mapping

    def refuse_tag(self, node):
        self._refuse(f"the tag {node.tag} is not read: only plain values are, and nothing that may run code", node)

    def _refuse(self, problem: str, place: yaml.Event | yaml.Node) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


_ConfigLoader.add_constructor(None, _ConfigLoader.refuse_tag)


def _load_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises InputError, in one line, for a file that is none or is too long for one."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST_CONFIG + 1)
    except OSError as error:
        raise InputError(f"--config {path}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--config {path}: not a text file in UTF-8; give a YAML file") from None
    if len(text) > LONGEST_CONFIG:
        raise InputError(f"--config {path}: longer than {LONGEST_CONFIG:,} characters; give a YAML file of options")
    try:
        return yaml.load(text, _ConfigLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    except Exception as error:  # PyYAML stumbles over odd values in many ways, such as a date in month 13
        reason = f"{type(error).__name__}: {printable(error)}"
    raise InputError(f"--config {path}: not valid YAML: {reason}")


def _read_config(parser: argparse.ArgumentParser, path: Path, problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    """(section, key, value) of every key of the file that is this parser's; the others are added to problems."""
    try:
        content = _load_yaml(path)
    except InputError as error:
        problems.append(str(error))
        return
    if not isinstance(content, dict | None):
        problems.append(f"--config {path}: expected the sections {', '.join(SECTIONS)}")
        return
    own = {group.title: [a.dest for a in group._group_actions] for group in parser._action_groups}
    own = {section: own[section] for section in SECTIONS if section in own}
    for section, entries in (content or {}).items():
        if section not in SECTIONS:
            hint = _nearest(section, SECTIONS) or _right_section(section, own)
            problems.append(f"{printable(section)}: no such section in {path}{hint}")
        elif not isinstance(entries, dict | None):
            problems.append(f"{section}: expected a section with `key: value` lines in {path}")
        elif section in own:
            for key, value in (entries or {}).items():
                if key in own[section]:
                    yield section, key, value
                elif key not in SECTIONS[section]:
                    hint = _right_section(key, own) or _nearest(key, own[section])
                    problems.append(f"{section}.{printable(key)}: no such key in {path}{hint}")


def _right_section(key: Any, own: dict[str, list[str]]) -> str:
    section = next((section for section, keys in own.items() if key in keys), None)
    return f" (it belongs into the section {section})" if section else ""


def _nearest(name: Any, known: Iterable[str]) -> str:
    name, known = printable(name), list(known)
    match = [full for full in known if full.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def _convert(action: argparse.Action, value: Any) -> Any:
    """A flag's words or a YAML value -> the option's value, checked alike."""
    if value is None and action.default is None:  # `key: null`
        return None
    if action.nargs == 0:  # a switch such as --freeze-backbone
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {printable(repr(value))}")
        return value
    if action.nargs is None or action.nargs == "?":
        return _convert_one(action, value)
    if not isinstance(value, list) or (action.nargs == "+" and not value):
        raise ValueError(f"expected a list, got {printable(repr(value))}" if value else "expected at least one value")
    return [_convert_one(action, item) for item in value]


def _convert_one(action: argparse.Action, value: Any) -> Any:
    kind = action.type or str
    if value is None or value == "" or not isinstance(value, str | int | float | Path):
        raise ValueError(f"expected a value, got {'none' if value in (None, '') else printable(value)}")
    if isinstance(value, bool) and kind is not boolean:
        raise ValueError(f"expected a value, got {str(value).lower()}")
    # Through text, because PyYAML reads 1e-3 as a string and the converters read text.
    try:
        text = str(value)
        converted = kind(text)
    except ValueError:
        raise ValueError(f"invalid value {printable(value)}") from None
    if "\0" in text:
        raise ValueError("expected text without a NUL character")
    if action.choices is not None and converted not in action.choices:
        names = [str(choice) for choice in action.choices]
        raise ValueError(f"{printable(repr(value))} is none of {', '.join(names)}{_nearest(text, names)}")
    return converted


def check_places(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the device, the precision and the folders of a run, each problem a line."""
    try:
        select_precision(args.precision, select_device(args.device))
    except InputError as error:
        yield str(error)
    # os.path and not Path: that raises an error for a name too long for the file system.
    if args.data_dir is not None and not os.path.exists(args.data_dir):
        yield f"--data-dir {args.data_dir}: no such folder"
    existing = next(folder for folder in (args.output_dir, *args.output_dir.parents) if os.path.exists(folder))
    if not os.path.isdir(existing):
        yield f"--output-dir {args.output_dir}: {existing} is a file; name a folder"
    elif not os.access(existing, os.W_OK):
        yield f"--output-dir {args.output_dir}: no permission to write to {existing}; name another folder"


# ----------------------------------------------------------------------------------------------------------------------
# How a run ends


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, and did so in an orderly way. `signum` is the signal."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum = signum


class StopRequests:
    """Within its `with` block the first Ctrl-C or SIGTERM is only noted, for `check`. A second one stops at once."""

    def __init__(self):
        self.signum = 0

    def __enter__(self) -> "StopRequests":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # only there can signals be caught
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: Any) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum

    def check(self) -> None:
        """Raise Stopped if this process was asked to stop, or any other: all check together, so all stop together."""
        if distributed.all_sum(self.signum)[0]:
            raise Stopped(self.signum or signal.SIGTERM)

    def watched(self, batches: Iterable) -> Iterable:
        """The batches, with a check before each; without, where the processes' numbers of batches may differ."""
        for batch in batches:
            if distributed.world_size() == 1:
                self.check()
            yield batch


@contextlib.contextmanager
def faults_explained(device: torch.device, saves_memory: str) -> Iterator[list[DataLoader]]:
    """Within this block it is an InputError if memory runs out or a worker is killed.

    Args:
        device: where the memory is.
        saves_memory: what helps if it runs out.

    Yields:
        An empty list for the loaders whose workers may be killed, with `moco.data.Transformed` data sets.
    """
    loaders: list[DataLoader] = []
    try:
        yield loaders
    except (MemoryError, RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            where = device if isinstance(error, torch.OutOfMemoryError) else "cpu"
            raise InputError(f"out of memory on {where}: {saves_memory}") from None
        if distributed.is_lost_peer(error):
            raise InputError(
                "another process of this run has ended: look for its message, or whether it was killed"
            ) from None
        # A worker that ends while it hands over a batch breaks the connection.
        if "DataLoader worker" not in str(error) and not (
            any(loader.num_workers for loader in loaders) and isinstance(error, ConnectionError | EOFError)
        ):
            raise
        names = [name for loader in loaders for name in loader.dataset.names_being_read()]
        reason = (str(error).splitlines() or ["connection lost"])[0].rstrip(". ")
        reading = f" while images were read: {', '.join(names)}" if names else ""
        raise InputError(
            f"a process that loads images was killed{reading} ({reason}): if memory "
            "ran out, use fewer --workers or --workers 0; else look at these images"
        ) from None


def run_script(main: Callable[[], Any]) -> None:
    """Call main; its end is the script's: an `error:` message and exit code 2 for an InputError, 128 plus the signal's
    number where the run was stopped. Of several processes that fail together one speaks.
    """
    try:
        main()
        distributed.leave()
    except InputError as error:
        if distributed.first_to_fail():
            # A DataLoader worker's error arrives with the worker's traceback as text before the message.
            print(f"error: {str(error).rpartition('InputError: ')[2].strip()}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if distributed.is_main():
            print(f"{stop}" or "interrupted", file=sys.stderr)
        sys.stdout.flush()
        # At once: Python would wait for loading processes, however long they read.
        os._exit(128 + getattr(stop, "signum", signal.SIGINT))
    except Exception:
        if distributed.first_to_fail():
            raise
        sys.exit(2)


def make_folder(path: Path) -> None:
    """The folder of --output-dir, made if need be. Raises InputError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {path}: cannot make this folder: {error.strerror}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Randomness


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every generator, in tensors, tuples and numbers alone, as `torch.load(weights_only=True)` wants."""
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached_gaussian),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `rng_state()` returned this. CUDA states are left where the device count differs."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, cached_gaussian = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


# ----------------------------------------------------------------------------------------------------------------------
# Device and precision


def select_device(name: str) -> torch.device:
    """'auto' is the first of cuda, mps and cpu that is there; of several processes each gets its own GPU, or the CPU.

    Raises InputError for a device that is not there.
    """
    several = distributed.launched()
    if name == "auto":
        mps = torch.backends.mps.is_available() and not several
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if several and name.startswith("cuda:"):
        raise InputError(f"--device {name} would be the GPU of every process; use --device cuda, and each gets its own")
    if several and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):  # such as meta, on which nothing is computed
            raise NotImplementedError
        torch.empty(0, device=device)
        if several and device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device {name!r} is not available here; use --device auto or --device cpu") from None
    return device


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """'auto', 'fp32', 'bf16' or 'fp16' -> the dtype to autocast to.

    'auto' is bf16 on CUDA devices that compute in it, fp16 on other CUDA devices, fp32 elsewhere.
    Raises InputError for fp16 on the CPU, where it is slow and would need a loss scaler that PyTorch lacks there.
    """
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise InputError("precision fp16 needs a GPU; on the CPU use --precision bf16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision in `dtype`; float32 means none."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes at the peak so far: tensors on a CUDA device, else resident memory of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux; ru_maxrss would start at the peak of the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


# ----------------------------------------------------------------------------------------------------------------------
# Schedule and evaluation


SCHEDULES = ("cosine", "step", "constant")


def lr_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0, schedule: str = "cosine"
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate's course over `total_steps` optimizer steps, the first `warmup_steps` a linear warm-up.

    Args:
        schedule: 'cosine' falls to 0; 'step' falls to a tenth after 60% and again after 80% of the steps, as MoCo v1's
            does (1911.05722, section 4); 'constant'.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        if schedule == "step":
            return 0.1 ** sum(step >= share * total_steps for share in (0.6, 0.8))
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this block the model is in eval mode; each of its modules is then in the mode in which it was."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@torch.no_grad()
def extract_features(
    model: nn.Module, loader: Iterable, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head of `model` receives, over the loader, in eval mode; the model's mode is as before afterwards.

    Returns:
        float32 features of shape (N, D) and labels of shape (N,), both on `device`.
    """
    features, labels = [], []
    with eval_mode(model):
        for images, targets in loader:
            with autocast(device, dtype):
                features.append(forward_features(model, images.to(device, non_blocking=True)).float())
            labels.append(targets.to(device))
    return torch.cat(features), torch.cat(labels)


def knn_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy (0 to 1) of the weighted k-nearest-neighbour vote by cosine similarity (1805.01978, section 3.4).

    Each of the k nearest training images votes for its class with weight exp(similarity / temperature).
    """
    bank = F.normalize(train_features.float(), dim=1)
    classes, k, correct = int(train_labels.max()) + 1, min(k, len(bank)), 0
    for queries, targets in zip(features.float().split(1024), labels.split(1024), strict=True):
        similarity, neighbour = (F.normalize(queries, dim=1) @ bank.T).topk(k, dim=1)  # (B, N) -> (B, k)
        votes = torch.zeros(len(queries), classes, device=bank.device)
        votes.scatter_add_(1, train_labels[neighbour], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == targets).sum())
    return correct / len(labels)
