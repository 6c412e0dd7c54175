"""Cross-validation: a run for each part of the images, which trains on the others and is evaluated on this one."""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from toolkit import InputError, distributed
from toolkit.answers.tasks import TASKS, Task, baseline_keys
from toolkit.config import stored_sections
from toolkit.files import write_csv, write_text
from toolkit.images.splitting import read_folds
from toolkit.run import output_folder
from toolkit.run.guard import Collapsed
from toolkit.run.options import FREE_TO_CHANGE, FineTuneOptions
from toolkit.run.plan import YAML_SECTIONS
from toolkit.run.run_state import changed_settings

# In --output-dir
FOLDER = "folds"
TABLE = "folds.csv"


def cross_validate(
    run: Callable[[list[str], Callable | None], dict[str, Any]],
    argv: Sequence[str] | None,
    after_epoch: Callable | None,
    args: FineTuneOptions,
) -> dict[str, Any]:
    """Run each part in turn, in a folder of its own; write and print a table of them, with mean and spread.

    With `--resume` finished parts are not run again, and an unfinished one goes on.

    Args:
        run: `finetune_lora.main`.
        argv: its command line, which has `--folds 5`; a part is the same command with `--folds 2/5`.
        after_epoch: what `run` takes beside it.
        args: the options in it.

    Returns:
        `folds`: the results of each part; and the mean of their scores, under its name in `results.json`.

    Raises:
        InputError: as `run`; the finished parts are kept. Or these are of runs with other settings.
    """
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
    _, count = read_folds(args.folds)
    settings = stored_sections(YAML_SECTIONS, args)
    files = output_folder.FINE_TUNING_FILES
    with output_folder.held(args.output_dir, "finetune_lora.py", files, args.resume) as begin:
        if args.resume:
            _check_settings(args.output_dir / SETTINGS, settings)
        begin()
        found = []
        for number in range(1, count + 1):
            own = args.output_dir / FOLDER / str(number)
            finished = own / "results.json"
            if finished.exists():
                print(f"part {number} of {count}: finished in {own}")
                found.append(json.loads(finished.read_text()))
                continue
            print(f"\npart {number} of {count}")
            command = [*words, "--folds", f"{number}/{count}", "--output-dir", str(own)]
            command += ["--resume"] if (own / "last.pth").exists() else []
            found.append(_results(run, command, after_epoch))
            if distributed.is_main():
                write_text(yaml.safe_dump(settings, sort_keys=False), args.output_dir / SETTINGS)
        return _summed_up(found, args) if distributed.is_main() else {}


def _results(run: Callable, command: list[str], after_epoch: Callable | None) -> dict[str, Any]:
    try:
        return run(command, after_epoch)
    except Collapsed as stopped:  # what the last good adapter reaches is what this part reaches
        print(stopped)
        return stopped.results


def _check_settings(path: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Raise InputError if finished parts are of runs with other settings."""
    try:
        then = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):  # no part is finished; an unfinished one is checked when it goes on
        return
    changed = changed_settings(then, settings, FREE_TO_CHANGE) if isinstance(then, dict) else ["all"]
    if changed:
        raise InputError(
            f"{path} has other settings ({', '.join(changed)}); resume with the same ones, or start without --resume"
        )


def _summed_up(found: Sequence[dict[str, Any]], args: FineTuneOptions) -> dict[str, Any]:
    """The results of all parts together; writes and prints their table."""
    task = TASKS[args.task]
    score = f"val_{task.score}"
    probe = f"{baseline_keys(task)[1]}_before"
    rows = []
    for part, results in enumerate(found, 1):
        rows.append({"part": part, "val_images": results["val_images"], probe: results[probe], score: results[score]})
    mean = {"part": "mean"}
    spread = {"part": "spread"}
    for name in (probe, score):
        values = [row[name] for row in rows if row[name] is not None]  # a random head has no probe
        mean[name] = statistics.mean(values) if values else None
        spread[name] = statistics.stdev(values) if len(values) > 1 else None
    rows += [mean, spread]
    write_csv(rows, ("part", "val_images", probe, score), args.output_dir / TABLE)
    print(f"\n{_table(rows, (probe, score), task)}\n\ntable in {args.output_dir / TABLE}")
    return {"folds": list(found), score: mean[score], f"{score}_spread": spread[score], probe: mean[probe]}


def _table(rows: Sequence[dict[str, Any]], names: Sequence[str], task: type[Task]) -> str:
    factor, unit = task.axis
    decimals = 2 if unit else 3
    lines = [f"{'part':<8}{'images':>8}{f'linear probe{unit}':>20}{f'{task.score_title}{unit}':>20}"]
    for row in rows:
        line = f"{row['part']:<8}{row.get('val_images', ''):>8}"
        for name in names:
            shown = "" if row[name] is None else f"{factor * row[name]:.{decimals}f}"
            line += f"{shown:>20}"
        lines.append(line)
    return "\n".join(lines)
