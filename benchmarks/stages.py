"""One command of `finetune_lora.py` in this process, and the CPU seconds of each of its stages, as JSON.

    python -m benchmarks.stages profile.json --data-dir photographs --checkpoint resnet18_v2.pth --workers 0

`benchmarks.time_to_accuracy --stages` prints them as a table. CPU seconds are of all threads of the process and not of
loading processes, so give --workers 0. Another job on the machine matters less for them than for the time of day. What
a stage imports counts as imports. Nothing but the standard library is imported before the clock runs.
"""

import builtins
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any


class Stopwatch:
    """CPU seconds by stage. Of stages within each other the innermost one has the time."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.running = ["other"]
        self.since = 0.0  # the process's own start

    def note(self) -> None:
        """Give the time since the last note to the stage that runs."""
        now = time.process_time()
        stage = self.running[-1]
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.since
        self.since = now

    def measures(self, owner: Any, name: str, stage: str, within: str | None = None) -> None:
        """From now on what `owner` calls by this name is the stage; if `within` is given, in that stage alone."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if within not in (None, self.running[-1]):
                return function(*args, **kwargs)
            self.note()
            self.running.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.note()
                self.running.pop()

        setattr(owner, name, measured)


def profile(flags: list[str]) -> dict[str, Any]:
    """Run the command. Returns the seconds of its stages, its accuracy and the number of its epochs."""
    watch = Stopwatch()
    watch.measures(builtins, "__import__", "imports")
    import finetune_lora
    from toolkit.run import reports

    watch.measures(finetune_lora, "prepare", "images and model")
    watch.measures(finetune_lora, "with_norms_chosen", "start")
    run = finetune_lora.FineTuning
    for name in ("__init__", "start"):
        watch.measures(run, name, "start")
    watch.measures(finetune_lora, "train", "training steps")
    for name in ("evaluate_watched", "evaluate_kept"):
        watch.measures(run, name, "evaluation between epochs", within="training steps")
    for name in ("save", "begin_epoch", "end_epoch", "go_back"):
        watch.measures(run, name, "files between epochs", within="training steps")
    watch.measures(finetune_lora, "finish", "calibration and last evaluation")
    watch.measures(reports, "write_finetuning", "report and pictures")
    results = finetune_lora.main(flags)
    watch.note()
    watch.seconds["whole command"] = sum(watch.seconds.values())
    return {"seconds": watch.seconds, "accuracy": results["val_accuracy"], "epochs": results["epochs"]}


if __name__ == "__main__":
    output, *flags = sys.argv[1:]
    Path(output).write_text(json.dumps(profile(flags)))
