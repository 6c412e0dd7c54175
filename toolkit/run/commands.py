"""The command line of `deploy_lora.py`: its commands, their options, and what is wrong with these."""

import argparse
import contextlib
import glob
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit import VERSION, InputError, did_you_mean, homed, is_free, note_written, printable, same_file, unnoted
from toolkit.choices import ARITHMETICS, PRECISIONS, TO_LABEL
from toolkit.config import add_option, positive_int, positive_share, threshold_goal, unknown_words, worker_count
from toolkit.images.families import option_problems, split_names
from toolkit.models.names import checkpoint_path, fetched
from toolkit.run import output_folder
from toolkit.run.options import FineTuneOptions, scaling_of

COMMANDS = {  # and the help of each
    "info": "what is in an adapter file",
    "evaluate": "accuracy on labelled images",
    "compare": "two results over the same images: is one better by more than chance? or a table of many",
    "threshold": "choose again, on labelled images, the probability above which a label counts",
    "predict": "the most probable classes of images, as a table; masks and maps",
    "embed": "the features of images, as an array",
    "choose": "which images to label next, as a list and a page of their pictures",
    "explain": "which parts of each image decided the answer, as pictures",
    "demo": "a page in the browser on which an image is dropped and answered",
    "merge": "base and adapter as one state_dict that torchvision or timm loads",
    "export": "the merged model as a graph for onnxruntime or torch.export",
    "convert": "to the adapter format of PEFT, or to an adapter of a lower rank",
    "card": "a model card: what it is, its figures, and how to load it",
}
ANSWERING = ("predict", "embed", "explain", "choose")
ON_IMAGES = ("evaluate", "threshold", *ANSWERING)  # these commands compute on a device
# Options of a run that `choose` has for a checkpoint.
OF_CHECKPOINT = ("arch", "heads", "channels", "image_size", "bands", "scale", "mean", "std", "normalise")
MAP_SUFFIXES = (".tif", ".tiff")
PATHS = "_paths.csv"  # what the images' paths end with, next to their features
SUFFIXES = {  # allowed for --output; "": a folder's
    "evaluate": (".json",),
    "predict": (".csv", *MAP_SUFFIXES, ""),
    "embed": (".npy", ""),
    "explain": ("",),
    "choose": ("",),
    "threshold": (".pth", ".safetensors"),
    "convert": (".pth", ".safetensors"),  # with --rank, else a folder
    "merge": (".pth", ".pt", ".bin", ".safetensors"),  # .json is what it says of them
    "export": (".onnx", ".pt2"),
    "card": (".md",),
}


def make_parser(description: str = "") -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and the parser of each command."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=VERSION)
    subparsers = parser.add_subparsers(dest="command", required=True)
    parsers = {name: subparsers.add_parser(name, help=text, allow_abbrev=False) for name, text in COMMANDS.items()}

    def add(commands: Iterable[str], name: str, meaning: str, **how: Any) -> None:
        for command in commands:
            parsers[command].add_argument(name, help=meaning, **how)

    of_adapters = COMMANDS.keys() - {"compare"}
    some = {"type": homed, "nargs": "+"}
    add(of_adapters - {"choose"}, "adapter", "adapter file, .pth or .safetensors", type=homed)
    add(["choose"], "adapter", "adapter file; or a checkpoint: a file, timm:NAME, moco-v2-800ep", type=checkpoint_path)
    add(["compare"], "results", "two results.json, of runs or evaluate --output, over the same images; or many", **some)
    add(["evaluate"], "images", "folder of classes, archives, or images/ and masks/; or a list", type=homed)
    add(["threshold"], "images", "list of labelled images that neither train nor judge the adapter", type=homed)
    add(set(ANSWERING) - {"choose"}, "images", "images, folders or lists of them, or a folder of archives", **some)
    add(["choose"], "images", "images, folders or lists of them", **some)
    add(["evaluate"], "--output", "the numbers as .json; the page lies next to it", type=homed)
    add(["demo"], "--write", "nothing starts: write what a Space of the Hugging Face Hub needs to a folder", type=homed)
    add(of_adapters - {"info", "evaluate", "demo"}, "--output", "the file or folder to write (required)", type=homed)
    add(of_adapters - {"info", "card"}, "--checkpoint", "the base, if it was moved", type=checkpoint_path)
    in_batches = set(ON_IMAGES) - {"explain"}  # which draws one image after the other
    computing = (*ON_IMAGES, "demo")
    add(in_batches | {"demo", "convert"}, "--batch-size", "images at a time", type=positive_int, default=32)
    add((*computing, "convert"), "--device", "auto, cpu, cuda, cuda:1, mps", default="auto")
    add(in_batches, "--workers", "processes that load images", type=worker_count, default="auto")
    add(computing, "--precision", "auto: 16 bits on a GPU; bf16: CPUs with AMX too", choices=PRECISIONS, default="auto")
    add(computing, "--arithmetic", "int8: multiply in 8 bits; large ViT on a CPU", choices=ARITHMETICS, default="float")
    add(["threshold"], "--goal", "f1, sensitivity=0.95 or specificity=0.9 per label", type=threshold_goal, default="f1")
    add(["choose"], "--count", "how many; without it 50, or all if fewer are left", type=positive_int)
    add(["choose"], "--labelled", "what has labels: lists, or folders of images", default=(), **some)
    for name in OF_CHECKPOINT:
        add_option(parsers["choose"], FineTuneOptions.__dataclass_fields__[name])
    add(["predict", "embed", "explain"], "--resume", "continue what is in the folder --output", action="store_true")
    add(["explain"], "--label", "the class, label or number to explain; without it the answer")
    add(["predict"], "--probabilities", "in maps: of every class, not the likeliest", action="store_true")
    add(["predict"], "--abstain", "in maps: no answer where no class is as probable as this", type=positive_share)
    add(["predict"], "--window", "in maps of answers for windows: their side in pixels", type=positive_int)
    add(["export"], "--normalise", "the graph takes images from 0 to 1, or the files' numbers", action="store_true")
    add(["convert"], "--to", "the format; --output is a folder", choices=["peft"])
    add(["convert"], "--rank", "in place of --to: the rank that is kept of each layer's change", type=positive_int)
    of_cut = "with --rank, labelled ones as of evaluate: BatchNorm statistics anew, and what both files score"
    add(["convert"], "--images", of_cut, type=homed)
    # Of the commands that do not ask.
    parser.set_defaults(labelled=(), workers="auto", precision="auto", arithmetic="float")
    return parser, parsers


def read_options(argv: Sequence[str] | None = None, description: str = "") -> argparse.Namespace:
    """The command and its options. Raises InputError with all that is wrong with them."""
    parser, parsers = make_parser(description)
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in COMMANDS:
        meant = did_you_mean(argv[0], COMMANDS)
        if meant:  # else argparse names all of them
            raise InputError(f"{printable(argv[0])}: no such command ({meant}); see --help")
    if {"", "--output="}.intersection(argv):  # as a path it would be the working directory
        raise InputError("an argument is empty: leave it out, or see whether a variable has no value")
    args, rest = parser.parse_known_args(argv)
    if problems := [*unknown_words(parsers[args.command], rest), *check(args)]:
        raise InputError("\n".join(problems))
    if "checkpoint" in args:
        args.checkpoint = fetched(args.checkpoint)
    if args.command == "choose":
        args.adapter = fetched(args.adapter)
    return args


INSIDE = {"choose": TO_LABEL, "convert": ("adapter_config.json", "adapter_model.safetensors")}  # the folder --output
# What else a command writes, by what follows the name of --output without its own ending.
ALSO = {"evaluate": ("_answers.csv", ".html"), "embed": (PATHS,), "merge": (".json",), "export": (".json",)}


def files_written(args: argparse.Namespace) -> list[Path]:
    """The files that a command writes outside a folder of answers, --output first, and the page of `evaluate` last."""
    if args.command == "evaluate" and args.output is None:
        return [args.adapter.parent / f"{args.adapter.stem}_evaluation.html"]
    if args.command == "choose" or (args.command == "convert" and args.rank is None):
        return list(map(args.output.joinpath, INSIDE[args.command]))
    if args.command in ANSWERING and not args.output.suffix:
        return []
    return [args.output, *(args.output.with_name(args.output.stem + ending) for ending in ALSO.get(args.command, ()))]


def problems_of_output(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with --output, before anything is computed: the first counts, and the rest builds on it."""
    is_for_peft = args.command == "convert" and args.rank is None
    suffixes = () if is_for_peft else SUFFIXES.get(args.command, ())
    if args.output is None:
        if args.command != "evaluate":
            yield "--output: expected a value, the file to write"
    elif os.path.isdir(args.output) and not is_for_peft and args.command not in ANSWERING:
        yield f"--output {args.output}: a folder; name a file"
    elif suffixes and args.output.suffix not in suffixes:
        endings = " or ".join(suffix or "nothing, as a folder's" for suffix in suffixes)
        yield f"--output {args.output}: the name must end in {endings}"
    elif "" in suffixes and not args.output.suffix and os.path.isfile(args.output):
        yield f"--output {args.output}: a file; name a folder"
    elif not os.path.isdir(args.output.parent):
        yield f"--output {args.output}: there is no folder {args.output.parent}; make it first"
    if args.command in ANSWERING and args.output.suffix != ".csv":  # which is no image
        for path in (*args.images, *args.labelled):
            if path.is_dir() and args.output.resolve().is_relative_to(path.resolve()):
                yield f"--output {args.output} is among the images in {path}: name a place outside"
    written = files_written(args)
    for path in filter(os.path.lexists, written):
        if not os.path.lexists(written[0]) or not is_free(path, _name(args)):  # it may belong to one that was renamed
            problem = f"{path} is there, not known to be of an earlier {args.command} that is still there"
            yield f"{problem}: move it, or name another --output{unnoted()}"
    if same_file(args.output, args.adapter):  # which an earlier call may have written
        yield f"--output {args.output} is the adapter that is read: name another file"


def _name(args: argparse.Namespace) -> str:
    return f"{args.command} {args.output and args.output.name}"  # two files may have one description: it is of one


@contextlib.contextmanager
def writing(args: argparse.Namespace) -> Iterator[None]:
    """Within this block no other command writes the files of this one, which then are known as its own."""
    paths = files_written(args)
    with output_folder.locked(paths[0].parent, f"-{paths[0].stem}", [glob.escape(path.name) for path in paths]):
        with output_folder.left_alone(lambda path: path not in paths or is_free(path, _name(args))):
            yield
        note_written(paths, _name(args))


def check(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the options of a command, one line each."""
    shows_page = args.command == "demo" and args.write is None
    compares = args.command == "convert" and args.images is not None
    if args.command == "choose":
        args.bands = split_names(args.bands)
        yield from option_problems(scaling_of(args), args.channels)
    if (shows_page or compares) and os.environ.get("WORLD_SIZE", "1") != "1":
        yield f"{args.command}: this is done by one process, and torchrun starts several: start it with python"
    if compares and args.rank is None:
        yield "--images is for a lower --rank: name that too, or drop --images"
    if "output" in args:
        yield from itertools.islice(problems_of_output(args), 1)
    if args.command in ("predict", "embed") and args.resume and args.output and args.output.suffix:
        yield "--resume is for answers in a folder, which --output is to name"
    if args.command == "convert" and args.rank is not None and args.to is not None:
        yield "--rank writes an adapter file of this toolkit, which convert takes to PEFT after: drop --to"
