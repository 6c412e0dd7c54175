"""The state of a run of either script: what training changes, what a resumed run needs, and the run's files."""

import contextlib
import io
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from toolkit import InputError, config, devices, distributed, files, listed
from toolkit.images.data import LoadingMeter
from toolkit.models.checkpoints import value_at
from toolkit.run import optim, options, runs, training


class StateEntry(NamedTuple):
    """An entry of a run's state, or anything that has these two, such as an optimizer: in a form for `torch.save`."""

    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], None]

    @classmethod
    def attribute(cls, thing: Any, name: str, plain: Callable = lambda value: value, made=lambda value: value):
        """The entry of an attribute: of its `plain` values, from which it is `made` again."""
        return cls(lambda: plain(getattr(thing, name)), lambda value: setattr(thing, name, made(value)))


class RunState:
    """What a run has done so far, and what it needs to resume, on a CPU bit for bit. Both scripts derive from it."""

    network: torch.nn.Module  # which is called in training, and is for them to set

    def __init__(self, args: options.RunOptions, device: torch.device, dtype: torch.dtype):
        self.args = args
        self.device = device
        self.dtype = dtype
        self.history: list[dict[str, Any]] = []  # a row for each finished epoch
        self.progress: training.Progress | None = None  # of the epoch that has begun
        self.baseline: dict[str, float | None] | None = None  # what was measured before training
        self.meter = LoadingMeter()
        self.stop = runs.StopRequests()
        self.trained_entries: dict[str, Any] = {}  # as `StateEntry`: what training changes, by key of `last.pth`
        self.other_entries = {  # what else a resumed run needs
            "history": StateEntry.attribute(self, "history"),
            "baseline": StateEntry.attribute(self, "baseline"),
            "meter": StateEntry(lambda: vars(self.meter), vars(self.meter).update),
            "progress": StateEntry.attribute(
                self, "progress", lambda now: now and vars(now), lambda state: state and training.Progress(**state)
            ),
        }
        self.identity: dict[str, Any] = {}  # `config`, `images`, `base`, and `class_names` if any: whose state it is

    def begin_training(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int, warmup_steps: int) -> None:
        """Set up optimizer, schedule and scaler; from here on each process draws random numbers of its own."""
        self.optimizer = optimizer
        self.steps_per_epoch = steps_per_epoch
        self.steps_read_together = training.STEPS_READ_TOGETHER.get(self.device.type, 1)
        self.schedule = optim.lr_schedule(optimizer, self.args.epochs * steps_per_epoch, warmup_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.parallel = distributed.parallel(self.network)
        if distributed.rank() > 0:
            devices.seed_everything(self.args.seed + distributed.rank())
        self.trained_entries |= {
            "optimizer": optimizer,
            "schedule": self.schedule,
            # Empty if the former run was not in float16, as with an automatic precision on another device
            "scaler": StateEntry(self.scaler.state_dict, lambda state: state and self.scaler.load_state_dict(state)),
            "rng": StateEntry(lambda: distributed.gather(devices.rng_state()), _restore_rng),  # by rank
        }

    def trained(self) -> dict[str, Any]:
        return {key: entry.state_dict() for key, entry in self.trained_entries.items()}

    def restore(self, trained: dict[str, Any]) -> None:
        """Undo everything that happened since `trained` returned this."""
        for key, entry in self.trained_entries.items():
            entry.load_state_dict(trained[key])

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on: the content of `last.pth`."""
        return self.trained() | {key: entry.state_dict() for key, entry in self.other_entries.items()} | self.identity

    def save_state(self) -> None:
        state = self.state()  # every process contributes
        if distributed.is_main():
            files.save_atomically(state, self.path("last.pth"))

    def save_metrics(self) -> None:
        """Write the history: every epoch once, also after a resume, and an empty field for what was not measured."""
        if distributed.is_main():
            columns = list(*self.history[:1])  # none before the first epoch
            files.write_cells((map(row.get, columns) for row in self.history), columns, self.path("metrics.csv"))

    def resume(self, path: Path, free: Container[str]) -> None:
        """Go on where `last.pth` was written. Raises InputError as `state_of_same_run`."""
        state = state_of_same_run(self.args, path, self.state().keys(), self.identity, free)
        for key, entry in (self.trained_entries | self.other_entries).items():
            entry.load_state_dict(state[key])
        print(f"resuming {path} after {self.done()}")

    def path(self, name: str) -> Path:
        return self.args.output_dir / name

    def done(self) -> str:
        steps = f" and {self.progress.steps} of {self.steps_per_epoch} steps" if self.progress else ""
        return f"{len(self.history)} of {self.args.epochs} epochs{steps}"

    @contextlib.contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Within this block stop requests are noted; one that is raised saves the state, and says where."""
        with self.stop:
            try:
                yield
                self.stop.check()  # a request that came after the last step
            except runs.Stopped as stopped:
                self.save_state()
                saved = f"Stopped; {self.done()} are saved in {self.path('last.pth')}"
                raise runs.Stopped(stopped.signum, f"{saved}. To go on: the same command with --resume") from None


def _restore_rng(states: list[dict[str, Any]]) -> None:
    if distributed.rank() < len(states):  # the state may have been written by fewer processes
        devices.restore_rng_state(states[distributed.rank()])


def copy_to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of anything that `torch.save` can write, sharing no memory with the original."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu", weights_only=True)


def state_of_same_run(args: Any, path: Path, keys: Collection, own: Mapping, free: Container[str]) -> dict[str, Any]:
    """The content of a `last.pth`; InputError if its keys, settings but those in `free`, images or base differ."""
    state = files.read_checkpoint(path, mapped=False)
    was = value_at(state, "config/data/unlabelled")
    unlabelled = value_at(own, "config/data/unlabelled")
    if was != unlabelled and value_at(state, "images") not in (None, own["images"]):
        both = f"was {was or 'not given'} in the run of {path}, and is {unlabelled or 'not given'} now"
        raise InputError(f"--unlabelled {both}: resume with the same images, or start without --resume")
    if None not in (value_at(state, "trials"), value_at(state, "config")) and "trials" not in keys:
        raise InputError(f"{path} is of a search for a learning rate: resume with --learning-rate auto")
    if not isinstance(state, dict) or state.keys() != keys:
        raise InputError(f"{path} is not a last.pth of this version, or of these images; start without --resume")
    then = config.flat(state["config"])
    now = config.flat(own["config"])
    changed = [f"{k} was {then.get(k)}, is {v}" for k, v in now.items() if k not in free and v != then.get(k)]
    if changed or state.get("class_names") != own.get("class_names"):
        what = ", ".join(changed) or "other classes"
        raise InputError(f"{path} belongs to a run with other settings ({what}); resume with the same ones")
    if state["images"] != own["images"]:
        there = listed(filter(None, (args.data_dir or "the data set", unlabelled)), by=" or ")
        raise InputError(f"{path} was trained on other images than {there} holds now: put those back, or drop --resume")
    if state["base"] != own["base"]:
        base = f"another base than {args.checkpoint}"
        raise InputError(f"{path} was trained over {base}: give its --checkpoint, and --stage1-adapter if any")
    return state


def write_config(path: Path, asked: Mapping[str, Any], settled: Mapping[str, Any] | None = None) -> None:
    """Write what was asked for, which `--config` reads, and what the run has settled of it, to be looked at."""
    if distributed.is_main():
        files.write_text(yaml.safe_dump({**asked, config.SETTLED: settled}, sort_keys=False), path)


def recorded_setting(path: Path | None, name: str) -> Any:
    """A setting of the fine-tuning that wrote this `last.pth`; None if there is no file, or not this setting in it."""
    if path is None or not path.exists():
        return None
    return value_at(files.read_checkpoint(path), f"config/finetune/{name}")
