"""Cross-validation: a run for each part of the images, which trains on the others and is evaluated on this one."""

from collections.abc import Callable, Mapping
from typing import Any

from toolkit import InputError, distributed
from toolkit.answers.comparison import table_of_runs
from toolkit.run import guard, options, output_folder, reports, run_state


def cross_validate(run: Callable, after_epoch: Any, args: options.FineTuneOptions, asked: Mapping[str, Any]) -> dict:
    """Run each part in turn, as `--folds 2/5`, in a folder of its own; print their mean, and return their results."""
    count = int(args.folds)
    parts = args.output_dir / "folds"
    config = args.output_dir / "config.yaml"  # which anybody may edit for the next run, also while the parts train
    of_parts = args.output_dir / ".folds.yaml"
    if args.resume and not parts.exists():
        raise InputError(f"--resume: {args.output_dir} has no parts to go on with; start without it")
    found = []
    names = (*output_folder.FINE_TUNING_FILES, of_parts.name)  # a cross-validation that was killed has left the last
    with output_folder.held(args.output_dir, names, args.resume) as begin:
        aside = begin()
        run_state.write_config(of_parts, asked)  # what --config named may be an earlier run's, and moved aside with it
        if not config.exists():
            run_state.write_config(config, asked)
        distributed.gather(None)  # until an earlier run's parts are out of the way, nobody looks for their files
        try:
            for number in range(1, count + 1):
                print(f"\npart {number} of {count}")
                own = parts / str(number)
                command = ["--config", str(of_parts), "--folds", f"{number}/{count}", "--output-dir", str(own)]
                command += ["--device", args.device]
                if (own / "last.pth").exists():  # a finished part is only evaluated again
                    command.append("--resume")
                try:
                    found.append(run(command, after_epoch))
                except guard.Collapsed as stopped:  # what the last good adapter reaches is what this part reaches
                    print(stopped)
                    found.append(stopped.results)
        finally:
            of_parts.unlink(missing_ok=True)
            if not parts.exists():  # the first one could not begin
                config.unlink(missing_ok=True)
                if aside is not None:
                    output_folder.put_back(aside, args.output_dir)
                    print(f"the earlier run is in {args.output_dir} again")
    if distributed.is_main():
        paths = [parts / str(number) / "results.json" for number in range(1, count + 1)]
        print(f"\n{reports.table(table_of_runs(paths, are_parts=True))}")
    return {"folds": found}
