"""The command line of `deploy_lora.py`: its commands, their options, and what is wrong with these.

It is read before PyTorch is loaded, which takes seconds.
"""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from toolkit import VERSION, InputError
from toolkit.choices import ARITHMETICS, PRECISIONS
from toolkit.config import positive_int, positive_share, threshold_goal, unknown_words, worker_count
from toolkit.models.names import checkpoint_path
from toolkit.paths import same_file

COMMANDS = {  # and the help of each
    "info": "what is in an adapter file",
    "evaluate": "accuracy on labelled images",
    "compare": "two results over the same images: is one better by more than chance? or a table of many",
    "threshold": "choose anew, on labelled images, from which probability on a label is an answer",
    "predict": "the most probable classes of images, as a table; masks and maps",
    "embed": "the features of images, as an array",
    "explain": "what of an image decided the answer, as a picture of each",
    "merge": "base and adapter as one state_dict that plain torchvision loads",
    "export": "the merged model as a graph for onnxruntime or torch.export",
    "convert": "to the adapter format of PEFT",
    "card": "a model card: what it is, its figures, and how to load it",
    "push": "adapter, card and page to the Hugging Face Hub",
}
ON_IMAGES = ("evaluate", "threshold", "predict", "embed", "explain")  # these commands compute on a device
MAP_SUFFIXES = (".tif", ".tiff")
FOLDERS = ("", ".parquet")  # of parts
PART_IMAGES = 10_000  # or some fewer, in a file of a folder of answers
SUFFIXES = {  # allowed for --output; "": a folder's
    "evaluate": (".json",),
    "predict": (".csv", ".parquet", *MAP_SUFFIXES, ""),
    "embed": (".npy", ""),
    "explain": ("",),
    "threshold": (".pth", ".safetensors"),
    "merge": (".pth", ".pt", ".bin", ".safetensors"),  # .json is the file beside it
    "export": (".onnx", ".pt2"),
    "card": (".md",),
}
# The packages that writing such files takes
NEEDED = {("predict", ".parquet"): ("pyarrow",), ("export", ".onnx"): ("onnx", "onnxscript")}


def make_parser(description: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and the parser of each command."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=VERSION)
    subparsers = parser.add_subparsers(dest="command", required=True)
    parsers = {}
    for name, text in COMMANDS.items():
        parsers[name] = command = subparsers.add_parser(name, help=text, allow_abbrev=False)
        if name == "compare":
            what = "results.json of runs, or of evaluate --output: two over the same images, or many"
            command.add_argument("results", type=Path, nargs="+", help=what)
            command.add_argument(
                "--output", type=Path, help="a table of all, runs.csv or runs.md, and a picture beside it"
            )
            continue
        command.add_argument("adapter", type=Path, help="adapter file, .pth or .safetensors")
        if name == "push":
            command.add_argument("repository", help="owner/name; is made unless it exists")
            command.add_argument("--private", action="store_true", help="make one that others cannot see")
            command.set_defaults(output=None)
        elif name != "info":
            what = "the file to write (required)"
            if name == "evaluate":
                what = "the numbers as .json; the page lies beside it"
            command.add_argument("--output", type=Path, help=what)  # `check_output` reports all problems at once
        if name not in ("info", "card", "push"):
            command.add_argument("--checkpoint", type=checkpoint_path, help="the base, if it was moved since training")
        if name in ON_IMAGES:
            command.add_argument("--batch-size", type=positive_int, default=32, help="images at a time")
            command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
            command.add_argument("--workers", type=worker_count, default="auto", help="processes that load images")
            what = "auto: 16 bits on a GPU; bf16: for CPUs with AMX too"
            command.add_argument("--precision", choices=PRECISIONS, default="auto", help=what)
            what = "int8: multiply in 8 bits; for a large ViT on a CPU"
            command.add_argument("--arithmetic", choices=ARITHMETICS, default="float", help=what)
    what = "folder with a folder of images per class, or with images/ and masks/; or a list"
    parsers["evaluate"].add_argument("images", type=Path, nargs="?", help=what)
    what = "a list of images and their labels, which neither trained the adapter nor are to judge it"
    parsers["threshold"].add_argument("images", type=Path, help=what)
    what = "f1, or sensitivity=0.95 or specificity=0.9 of each label"
    parsers["threshold"].add_argument("--goal", type=threshold_goal, default="f1", help=what)
    for name in ("predict", "embed", "explain"):
        parsers[name].add_argument(
            "images", type=Path, nargs="+", help="images, folders or lists of them, or a folder of archives"
        )
    for name in ("predict", "embed"):
        parsers[name].add_argument("--resume", action="store_true", help="go on with what is in the folder --output")
    predicting = parsers["predict"]
    predicting.add_argument("--probabilities", action="store_true", help="in maps: of every class, not the likeliest")
    what = "in maps: no answer where the likeliest class is less probable than this, as 0.6"
    predicting.add_argument("--abstain", type=positive_share, help=what)
    predicting.add_argument("--window", type=positive_int, help="in maps of an answer for windows: pixels; its own")
    what = "the graph takes images from 0 to 1, or files' numbers"
    parsers["export"].add_argument("--normalise", action="store_true", help=what)
    parsers["convert"].add_argument("--to", choices=["peft"], default="peft", help="the format; --output is a folder")
    return parser, parsers


def read_options(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The command and its options. Raises InputError with all that is wrong with them."""
    parser, parsers = make_parser(description)
    args, rest = parser.parse_known_args(argv)
    problems = check(args) + unknown_words(parsers[args.command], rest)
    if problems:
        raise InputError("\n".join(problems))
    return args


def check_output(args: argparse.Namespace) -> list[str]:
    """What is wrong with --output, before anything is computed."""
    if args.output is None:
        return [] if args.command == "evaluate" else ["--output: expected a value, the file to write"]
    if os.path.isdir(args.output) and args.command not in ("convert", "predict", "embed", "explain"):
        return [f"--output {args.output}: a folder; name a file"]
    suffixes = SUFFIXES.get(args.command, ())
    if suffixes and args.output.suffix not in suffixes:
        endings = " or ".join(filter(None, suffixes))
        if "" in suffixes:
            endings += ", or be a folder's"
        return [f"--output {args.output}: the name must end in {endings}"]
    if "" in suffixes and args.output.suffix in FOLDERS and os.path.isfile(args.output):
        return [f"--output {args.output}: a file; name a folder"]
    if not os.path.isdir(args.output.parent):
        return [f"--output {args.output}: there is no folder {args.output.parent}; make it first"]
    read = [args.adapter, getattr(args, "checkpoint", None)]
    if args.command in ("predict", "embed", "explain"):
        read += args.images
    if any(same_file(args.output, path) for path in read):
        return [f"--output {args.output} is read by this very command; name another file"]
    return []


def check(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options of a command, and which packages it lacks."""
    if args.command in ("info", "push"):
        return []
    if args.command == "compare":
        is_table = args.output is None or args.output.suffix in (".csv", ".md")
        return [] if is_table else [f"--output {args.output}: the name must end in .csv or .md"]
    problems = check_output(args)
    is_file = args.output is not None and args.output.suffix not in FOLDERS
    if args.command in ("predict", "embed") and args.resume and is_file:
        problems.append("--resume is for answers in a folder, which --output is to name")
    needed = NEEDED.get((args.command, getattr(args.output, "suffix", "")), ())
    if not all(map(importlib.util.find_spec, needed)):
        problems.append(f"--output {args.output}: needs {' and '.join(needed)}: pip install {' '.join(needed)}")
    return problems
