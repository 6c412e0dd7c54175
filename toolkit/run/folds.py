"""Cross-validation: a run for each part of the images, which trains on the others and is evaluated on this one."""

import argparse
from collections.abc import Callable
from typing import Any

from toolkit import InputError, distributed, files
from toolkit.answers.comparison import table_of_runs
from toolkit.images.splitting import read_folds
from toolkit.run import guard, options, output_folder, reports


def cross_validate(run: Callable, argv: list[str] | None, after_epoch: Any, args: options.FineTuneOptions) -> dict:
    """Run each part in turn, as `--folds 2/5`, in a folder of its own; print their mean, and return their results."""
    own_option = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own_option.add_argument("--resume", nargs="?")  # of the parts each has its own
    _, words = own_option.parse_known_args(argv)
    _, count = read_folds(args.folds)
    parts = args.output_dir / "folds"
    if args.resume and not parts.exists():
        raise InputError(f"--resume: {args.output_dir} has no parts to go on with; start without it")
    found = []
    with output_folder.held(args.output_dir, output_folder.FINE_TUNING_FILES, args.resume) as begin:
        settings = args.config and args.config.read_bytes()  # maybe an earlier run's of this folder, which moves aside
        begin()
        if settings is not None and distributed.is_main() and not args.config.exists():
            with files.open_atomically(args.config) as file:
                file.write(settings)
        distributed.gather(None)  # until an earlier run's parts are out of the way, nobody looks for their files
        for number in range(1, count + 1):
            print(f"\npart {number} of {count}")
            own = parts / str(number)
            command = [*words, "--folds", f"{number}/{count}", "--output-dir", str(own)]
            if (own / "last.pth").exists():  # a finished part is only evaluated again
                command.append("--resume")
            try:
                found.append(run(command, after_epoch))
            except guard.Collapsed as stopped:  # what the last good adapter reaches is what this part reaches
                print(stopped)
                found.append(stopped.results)
    if distributed.is_main():
        paths = [parts / str(number) / "results.json" for number in range(1, count + 1)]
        print(f"\n{reports.table(table_of_runs(paths, are_parts=True))}")
    return {"folds": found}
