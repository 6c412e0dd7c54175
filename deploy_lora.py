"""After training: look into an adapter file, or merge it with its base into one file that serves without this toolkit.

    python deploy_lora.py info checkpoints/lora/lora.pth                        # what is in the file
    python deploy_lora.py merge checkpoints/lora/lora.pth --output merged.pth   # one state_dict for plain torchvision

Each command is a function of the parsed options; the table COMMANDS lists them all.
"""

import argparse
import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from finetune_lora import load_finetuned
from lora_utils import LoRAManager, read_adapter_file
from moco import InputError, printable
from moco.files import open_atomically, save_atomically
from moco.options import unknown_words
from moco.runs import run_script


def info(args: argparse.Namespace) -> dict[str, Any]:
    """Print what is in an adapter file and return it."""
    content = read_adapter_file(args.adapter)
    numel = sum(tensor.numel() for tensor in content["tensors"].values())
    size = args.adapter.stat().st_size / 1e6
    print(f"{args.adapter}: {len(content['layers'])} adapted layers, {numel:,} parameters, {size:.2f} MB")
    for key, value in content["metadata"].items():
        print(f"  {printable(key)}: {printable(_SHORT.repr(value), 1000)}")
    for name, record in content["layers"].items():
        print(f"  {printable(name)}: {printable(record['kind'])}, r={record['r']}, scaling={record['scaling']:g}")
    return content


# Lists may hold the same list many times over: written out in full, a few hundred bytes could fill the memory.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 3, 100, 100, 200, 200


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """Write base and adapter as one state_dict with torchvision's own keys; returns the adapter's metadata."""
    model, metadata = load_finetuned(args.adapter, args.checkpoint)
    LoRAManager(model).merge_lora_weights()
    state = model.state_dict()
    if args.output.suffix == ".safetensors":
        with open_atomically(args.output) as file:
            file.write(safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()}))
    else:
        save_atomically(state, args.output)
    classes = len(metadata["class_names"])
    print(f"wrote {args.output}: a state_dict for torchvision's {metadata['arch']} with {classes} classes")
    return metadata


def check_merge(args: argparse.Namespace) -> list[str]:
    """What is wrong with the options of `merge`."""
    if args.output is None:
        return ["--output: expected a value, the file to write"]
    return [
        f"--output {args.output} is what is to be merged; name another file"
        for path in (args.adapter, args.checkpoint)
        if path is not None and os.path.exists(args.output) and os.path.exists(path)
        if os.path.samefile(args.output, path)
    ]


# Command -> what it does, what is wrong with its options, and its line of help.
COMMANDS: dict[str, tuple[Callable, Callable, str]] = {
    "info": (info, lambda args: [], "what is in an adapter file"),
    "merge": (merge, check_merge, "base and adapter as one state_dict that plain torchvision loads"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run one of COMMANDS. Raises InputError with all that is wrong with the options, or for files that do not fit."""
    parser = argparse.ArgumentParser(description="Look into an adapter file, or merge it into one state_dict.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    parsers = {
        name: subparsers.add_parser(name, help=text, allow_abbrev=False) for name, (*_, text) in COMMANDS.items()
    }
    for command in parsers.values():
        command.add_argument("adapter", type=Path, help="adapter file, .pth or .safetensors")
    parsers["merge"].add_argument("--output", type=Path, help="file to write, .pth or .safetensors")
    parsers["merge"].add_argument("--checkpoint", type=Path, help="the base, if it is not where it was at training")
    args, rest = parser.parse_known_args(argv)
    run, check, _ = COMMANDS[args.command]
    problems = unknown_words(parsers[args.command], rest) + check(args)
    if problems:
        raise InputError("\n".join(problems))
    return run(args)


if __name__ == "__main__":
    run_script(main)
