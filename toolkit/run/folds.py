"""Cross-validation: a run for each part of the images, which trains on the others and is evaluated on this one."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from toolkit import InputError, distributed
from toolkit.answers.tasks import TASKS, baseline_keys
from toolkit.files import write_csv
from toolkit.images.splitting import read_folds
from toolkit.run import output_folder
from toolkit.run.guard import Collapsed
from toolkit.run.options import FineTuneOptions

TABLE = "folds.csv"  # in --output-dir


def cross_validate(
    run: Callable[[list[str], Callable | None], dict[str, Any]],
    argv: Sequence[str] | None,
    after_epoch: Callable | None,
    args: FineTuneOptions,
) -> dict[str, Any]:
    """Run each part in turn, in a folder of its own; write and print their scores, with mean and spread.

    With `--resume` each part goes on from where it was; a finished one is only evaluated again. `run` is
    `finetune_lora.main`; a part is the same command with `--folds 2/5`.

    Returns `folds`, the results of each part, and the mean of their scores, under its name in `results.json`.
    """
    own_option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own_option.add_argument("--resume", nargs="?")  # of the parts each has its own
    _, words = own_option.parse_known_args(argv)
    _, count = read_folds(args.folds)
    parts = args.output_dir / "folds"
    if args.resume and not parts.exists():
        raise InputError(f"--resume: {args.output_dir} has no parts to go on with; start without it")
    found = []
    with output_folder.held(args.output_dir, output_folder.FINE_TUNING_FILES, args.resume) as begin:
        begin()
        distributed.gather(None)  # until an earlier run's parts are out of the way, nobody looks for their files
        for number in range(1, count + 1):
            print(f"\npart {number} of {count}")
            own = parts / str(number)
            command = [*words, "--folds", f"{number}/{count}", "--output-dir", str(own)]
            if (own / "last.pth").exists():
                command.append("--resume")
            try:
                found.append(run(command, after_epoch))
            except Collapsed as stopped:  # what the last good adapter reaches is what this part reaches
                print(stopped)
                found.append(stopped.results)
        return _summed_up(found, args) if distributed.is_main() else {}


def _summed_up(found: Sequence[dict[str, Any]], args: FineTuneOptions) -> dict[str, Any]:
    """The results of all parts together; writes a table of them, and prints what they are."""
    task = TASKS[args.task]
    score = f"val_{task.score}"
    probe = f"{baseline_keys(task)[1]}_before"
    rows = [{"part": part} | results for part, results in enumerate(found, 1)]
    write_csv(rows, ("part", "val_images", probe, score), args.output_dir / TABLE)
    summed_up: dict[str, Any] = {"folds": list(found)}
    print()
    for title, name in (("linear probe", probe), (task.score_title, score)):
        values = [results[name] for results in found if results[name] is not None]  # a random head has no probe
        summed_up[name] = statistics.mean(values) if values else None
        summed_up[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        if values:
            spread = "" if len(values) < 2 else f" ± {task.reported(summed_up[f'{name}_spread'])}"
            each = ", ".join(map(task.reported, values))
            print(f"{title:<22}{task.reported(summed_up[name])}{spread} of {each}")
    print(f"table in {args.output_dir / TABLE}")
    return summed_up
