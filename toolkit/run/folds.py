"""Cross-validation: a run for each part of the images, which trains on the others and is evaluated on this one."""

import argparse
import contextlib
import hashlib
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from toolkit import InputError, distributed
from toolkit.answers.comparison import read_results
from toolkit.answers.tasks import TASKS, baseline_keys
from toolkit.config import stored_sections
from toolkit.files import write_csv, write_text
from toolkit.images.splitting import read_folds
from toolkit.models.checkpoints import is_none
from toolkit.run import output_folder
from toolkit.run.guard import Collapsed
from toolkit.run.loaders import load_images
from toolkit.run.options import FREE_TO_CHANGE, YAML_SECTIONS, FineTuneOptions, known_image_values
from toolkit.run.run_state import check_same_run, write_config

TABLE = "folds.csv"  # in --output-dir
IDENTITY = "folds/identity.json"  # where each part has a folder beside it


def cross_validate(
    run: Callable[[list[str], Callable | None], dict[str, Any]],
    argv: Sequence[str] | None,
    after_epoch: Callable | None,
    args: FineTuneOptions,
    asked: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Run each part in turn, in a folder of its own; write and print a table of them, with mean and spread.

    With `--resume` finished parts are not run again, and an unfinished one goes on; InputError if they are of other
    settings. `run` is `finetune_lora.main`; a part is the same command with `--folds 2/5`.

    Returns `folds`, the results of each part, and the mean of their scores, under its name in `results.json`.
    """
    own_option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own_option.add_argument("--resume", nargs="?")  # of the parts each has its own
    _, words = own_option.parse_known_args(argv)
    _, count = read_folds(args.folds)
    path = args.output_dir / IDENTITY
    with output_folder.held(args.output_dir, output_folder.FINE_TUNING_FILES, args.resume) as begin:
        identity = _identity(args)
        if args.resume:
            if not path.exists():
                raise InputError(f"--resume: {args.output_dir} has no parts to go on with; start without it")
            try:
                check_same_run(args, path, json.loads(path.read_text(encoding="utf-8")), identity, FREE_TO_CHANGE)
            except (json.JSONDecodeError, KeyError):
                raise InputError(f"{path} is damaged: start without --resume") from None
        begin()
        if distributed.is_main():
            path.parent.mkdir(exist_ok=True)
            write_text(json.dumps(identity, indent=2), path)
        write_config(args.output_dir / "config.yaml", asked, identity["config"])
        distributed.gather(None)  # until an earlier run's parts are out of the way, nobody looks for finished ones
        found = []
        for number in range(1, count + 1):
            own = path.with_name(str(number))
            if (own / "results.json").exists():
                print(f"part {number} of {count}: finished in {own}")
                found.append(read_results(own / "results.json"))
                continue
            print(f"\npart {number} of {count}")
            command = [*words, "--folds", f"{number}/{count}", "--output-dir", str(own)]
            if (own / "last.pth").exists():
                command.append("--resume")
            try:
                found.append(run(command, after_epoch))
            except Collapsed as stopped:  # what the last good adapter reaches is what this part reaches
                print(stopped)
                found.append(stopped.results)
        return _summed_up(found, args) if distributed.is_main() else {}


def _identity(args: FineTuneOptions) -> dict[str, Any]:
    """What all parts share: the settings, a digest of the images, and one of each file that the base is made of."""
    with contextlib.redirect_stdout(io.StringIO()):  # each part says what it reads
        _, read = known_image_values(args, args.checkpoint)
        splits = load_images(replace(args, folds=f"1/{read_folds(args.folds)[1]}"), read)
    files = [path for path in (args.checkpoint, args.stage1_adapter) if path is not None and not is_none(path)]
    return {
        "config": stored_sections(YAML_SECTIONS, args),
        "images": splits.digest(),
        "base": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
    }


def _summed_up(found: Sequence[dict[str, Any]], args: FineTuneOptions) -> dict[str, Any]:
    """The results of all parts together; writes and prints their table."""
    task = TASKS[args.task]
    score = f"val_{task.score}"
    probe = f"{baseline_keys(task)[1]}_before"
    rows = [{"part": part} | results for part, results in enumerate(found, 1)]
    mean = {"part": "mean"}
    spread = {"part": "spread"}
    for name in (probe, score):
        values = [row[name] for row in rows if row[name] is not None]  # a random head has no probe
        mean[name] = statistics.mean(values) if values else None
        spread[name] = statistics.stdev(values) if len(values) > 1 else None
    rows += [mean, spread]
    write_csv(rows, ("part", "val_images", probe, score), args.output_dir / TABLE)
    print(f"\n{'part':<8}{'images':>8}{'linear probe':>20}{task.score_title:>20}")
    for row in rows:
        shown = ["" if row[name] is None else task.reported(row[name]) for name in (probe, score)]
        print(f"{row['part']:<8}{row.get('val_images', ''):>8}{shown[0]:>20}{shown[1]:>20}")
    for what, images in found[0].get("chosen_by", {}).items():
        print(f"the {what} of each part was chosen by {images}")
    print(f"\ntable in {args.output_dir / TABLE}")
    return {"folds": list(found), score: mean[score], f"{score}_spread": spread[score], probe: mean[probe]}
