"""Stage 1: pretrain a backbone with MoCo, without labels.

    python -m moco.pretrain --config configs/stage1.yaml                 # the shipped checkpoint: 18 minutes on 2 cores
    python -m moco.pretrain --config configs/stage1.yaml --epochs 1 --warmup-epochs 0   # does it run?
    python -m moco.pretrain --config configs/stage1.yaml --resume        # go on where it was stopped
    python -m moco.pretrain --config configs/moco_v2.yaml --data-dir photos     # any images, with or without labels
    python -m moco.pretrain --checkpoint moco_v2_800ep_pretrain.pth.tar --lora-rank 8 --data-dir photos # go on, adapted
    python -m moco.pretrain --config configs/moco_v2.yaml --data-dir /data/imagenet --precision bf16     # on a GPU
    torchrun --nproc-per-node=8 -m moco.pretrain --config configs/moco_v2.yaml --data-dir /data/imagenet # on eight

With --checkpoint stage 1 goes on from another one's end, with images of your own: with --lora-rank in adapters alone,
over a frozen backbone that queries and keys share, else in all weights.

Every option is a flag and a key of the configuration file, whose sections are the groups below (see --help).
"""

import argparse
import json
import math
import os
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from finetune_lora import add_lora_to_model, freeze_backbone_params, load_base
from lora.fusion import fuse
from lora_utils import LoRAManager, trained_state
from moco.builder import MoCo, MoCoV3
from toolkit import (
    InputError,
    bands,
    checkpoints,
    config,
    data,
    distributed,
    measures,
    options,
    output_folder,
    reports,
    runs,
    training,
    transforms,
)
from toolkit.backbones import ARCHS, build_backbone, default_image_size, head_name, headless, other_heads
from toolkit.cache import cache_images
from toolkit.config import non_negative_float, non_negative_int, positive_float, positive_int
from toolkit.files import read_checkpoint, save_atomically, write_text
from toolkit.run_state import Part, RunState
from toolkit.shared_norms import share_statistics

# What may differ between a run and its resumption without changing what is computed.
FREE_TO_CHANGE = {"config", "output_dir", "resume", "device", "workers", "knn_every", "knn_dir", "save_every"}
FREE_TO_CHANGE |= {"tensorboard", "checkpoint"}  # a digest tells another base
FREE_TO_CHANGE |= set(options.PLACES_OF_IMAGES)
METRICS = ("epoch", "loss", *measures.TITLES, "learning_rate", "seconds")
OPTIMIZERS = ("adamw", "sgd", "lars")
# Of larger sets so many images are drawn for the k-NN accuracy: 400 MB of features of a ResNet-50.
KNN_BANK, KNN_QUERIES = 50_000, 10_000
COLLAPSED_RANK = 2.0  # fewer directions than this hold features that tell no images apart
MEASURED_IMAGES = 2_048  # images of which alignment, uniformity and effective rank are
SAVES_MEMORY = "lower --batch-size (and --learning-rate in proportion) or --image-size, or use --precision bf16"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pretrain as the options say.

    Returns:
        The content of `results.json`: of the last epoch `loss`, `knn_accuracy` (0 to 1; None without labels),
        `effective_rank` and, without labels, `alignment` and `uniformity` (`toolkit.measures`); `before`, the same of a
        checkpoint before any step; `epochs`, `seconds`, `images_per_second`, `waiting_share`, `peak_memory_bytes` and
        the paths `checkpoint` (with adapters, of `moco_lora.pth`) and `metrics`.
    """
    args, _ = config.parse_args(make_parser(), argv, check=complete)
    device = training.select_device(args.device)
    dtype = training.select_precision(args.precision, device)
    distributed.join(device)
    training.seed_everything(args.seed)
    held = output_folder.held(args.output_dir, "moco.pretrain", list(written(args)), args.resume)
    with runs.faults_explained(device, SAVES_MEMORY) as loaders, held as begin:
        run = Pretraining(args, device, dtype)
        loaders += run.loaders()
        if args.resume:
            run.resume(args.resume, FREE_TO_CHANGE)
        if args.checkpoint:
            print(run.origin)
        print(f"data: {len(run.loader.dataset):,} images{'' if run.knn_loaders else ' without labels'}")
        print(f"model: {args.arch}, MoCo v{args.moco_version}")
        print(training.describe_device(device, dtype))
        if args.moco_version != 3 and args.queue_size > len(run.loader.dataset):
            print(
                f"--queue-size {args.queue_size} is more than there are images: it holds an image's own older keys too"
            )
        begin()  # checkpoints of an earlier run that this one does not write stay
        run.train()
        if distributed.is_main():
            write_text(json.dumps(run.results(), indent=2, default=str), run.path("results.json"))
            reports.plot_pretraining(run.history, run.path("pretraining_curves.png"))
        return run.results()


def complete(args: argparse.Namespace, sources: dict[str, str]) -> list[str]:
    """Fill in what follows from other options; what is wrong with them together, a line each."""
    typed = config.typed_options(make_parser(), args, sources)
    problems = options.complete_data_options(args, sources)
    options.complete_adapter_options(args)
    if args.resume == Path():  # the flag alone
        args.resume = args.output_dir / "last.pth"
    problems += runs.environment_problems(args, written(args))
    if args.knn_dir and not os.path.isdir(args.knn_dir):
        problems.append(f"--knn-dir {args.knn_dir}: no such folder")
    problems += options.adapter_problems(args, typed)
    if "crop_min" in typed and args.two_crops == "digits":
        problems.append("--crop-min with --two-crops digits, which crops nothing: drop one of the two")
    if args.checkpoint is not None and not os.path.exists(args.checkpoint):
        problems.append(f"--checkpoint {args.checkpoint}: file not found; give the path of an existing checkpoint")
    if args.checkpoint is None and args.lora_rank > 0:
        problems.append(f"--lora-rank {args.lora_rank} without --checkpoint: give the pretrained weights to adapt")
    if args.checkpoint is None:
        args.moco_version = args.moco_version or 3
    elif sources["arch"] == "default":
        args.arch = None  # what the checkpoint says
    if args.warmup_epochs > args.epochs:
        problems.append(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}; lower it")
    return problems


def written(args: argparse.Namespace) -> Iterator[str]:
    """The names of the files that a run writes to --output-dir, of checkpoints only those that are there already."""
    yield from Pretraining.FILES
    for path in args.output_dir.glob("moco_stage1_epoch_*.pth"):
        number = path.stem.rpartition("_")[2]
        if number.isdecimal() and int(number) <= args.epochs:
            yield path.name


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moco.pretrain",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=config.HelpFormatter,
    )
    options.add_run_options(parser, output_dir=Path("checkpoints/pretrain"))
    model = parser.add_argument_group("model")
    model.add_argument("--arch", choices=ARCHS, default="vit_mini")
    options.add_shape_options(model)
    model.add_argument("--image-size", type=positive_int, help="pixels; default: what the arch was made for")
    options.add_data_options(parser)
    moco = parser.add_argument_group("moco")
    moco.add_argument(
        "--checkpoint", type=checkpoints.checkpoint_path, help="go on with this backbone, projector and predictor"
    )
    options.add_adapter_options(moco, rank=0)
    moco.add_argument("--moco-version", type=int, choices=(1, 2, 3), help="default: the checkpoint's, else 3")
    moco.add_argument("--epochs", type=positive_int, default=100)
    moco.add_argument("--batch-size", type=positive_int, default=256, help="of all processes together")
    moco.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    moco.add_argument("--learning-rate", "--lr", type=positive_float, default=1e-3)
    moco.add_argument("--weight-decay", type=non_negative_float, default=0.1)
    moco.add_argument("--schedule", choices=training.SCHEDULES, default="cosine")
    moco.add_argument("--warmup-epochs", type=non_negative_int, default=0)
    moco.add_argument("--precision", choices=training.PRECISIONS, default="auto")
    moco.add_argument("--momentum", type=config.fraction, default=0.99, help="m; v3 raises it to 1 along a cosine")
    moco.add_argument("--temperature", type=positive_float, default=0.2, help="T")
    moco.add_argument("--dim", type=positive_int, help="width of queries and keys; default: the checkpoint's, else 256")
    moco.add_argument(
        "--mlp-dim", type=positive_int, help="v3: hidden width of projector and predictor; the checkpoint's, else 4096"
    )
    moco.add_argument("--queue-size", type=positive_int, default=65536, help="v1, v2: K")
    moco.add_argument("--two-crops", choices=transforms.TWO_CROPS, default="moco_v3", help="how the views are made")
    moco.add_argument("--crop-min", type=config.fraction, default=0.2, help="smallest share of the area in a crop")
    moco.add_argument("--seed", type=non_negative_int, default=0)
    moco.add_argument("--knn-every", type=positive_int, default=10, help="epochs between k-NN accuracies")
    moco.add_argument("--knn-dir", type=Path, help="class folders to measure it on, if the images have no labels")
    moco.add_argument("--save-every", type=positive_int, default=20, help="epochs between checkpoints")
    return parser


class Pretraining(RunState):
    """A run: the model, its optimizer, its data and how far it is."""

    FILES = ("moco_lora.pth", "last.pth", "metrics.csv", "results.json", "pretraining_curves.png", "tensorboard")

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        super().__init__(args, device, dtype)
        self.model, self.origin = build_model(args, device)
        self.normalization, self.loader, self.knn_loaders, self.view_loader = load_data(args, device)
        if args.moco_version == 3:
            # v3 shuffles nothing: only statistics over all processes cannot tell which key belongs to which query.
            share_statistics(self.model)
        base = getattr(self.model.encoder_q, "base_digests", {}) if args.lora_rank > 0 else {}
        steps = len(self.loader)
        self.begin_training(self.model, build_optimizer(self.model, args), steps, args.warmup_epochs * steps)
        self.trained_parts["model"] = Part(self.model_state, self.restore_model)
        images = self.loader.dataset.dataset.digest
        self.identity |= {"images": images, "base": base}
        self.identity["config"] = {name: config.stored(value) for name, value in vars(args).items()}

    def train(self) -> None:
        """The remaining epochs. While they last, `last.pth` is what to go on from.

        Raises:
            Stopped: after Ctrl-C or SIGTERM, when the step is done and `last.pth` is written.
        """
        if self.args.checkpoint and self.baseline is None:
            self.baseline = self.measure()
            print(f"before training: {describe_measures(self.baseline)}")
        if self.global_steps == 0:
            self.save_state()  # whenever the run is killed from here on, it can be resumed
        with self.saved_when_stopped():
            while self.epoch < self.args.epochs:
                self.train_epoch()
                self.finish_epoch()
        if distributed.is_main():
            self.path("last.pth").unlink(missing_ok=True)

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return len(self.history)

    @property
    def global_steps(self) -> int:
        return self.epoch * self.steps_per_epoch + (self.progress.steps if self.progress else 0)

    def train_epoch(self) -> None:
        """What is left of a pass over the images; adds a row to the history."""
        epoch = self.epoch + 1
        if self.progress is None:
            self.progress = training.Progress(self.schedule.get_last_lr()[0])
        now, batches = self.progress, self.loader.batch_sampler
        batches.epoch, batches.start = self.epoch, now.steps
        self.model.train()
        title, total = f"epoch {epoch}/{self.args.epochs}", self.steps_per_epoch
        watched = self.meter.watched(self.loader)
        with now.timed(), runs.progress_bar(watched, title, initial=now.steps, total=total) as bar:
            for (x1, x2), _ in bar:
                loss = self.step(training.to_device(x1, self.device), training.to_device(x2, self.device))
                now.add(self.args.batch_size, 0, loss)
                told = {"loss": f"{loss:.3f}", "img/s": f"{self.meter.results()['images_per_second']:.0f}"}
                bar.set_postfix(told | self.meter.shown(), refresh=False)
                self.stop.check()
        row = {"epoch": epoch, "loss": now.loss_sum / now.steps, "learning_rate": now.learning_rate}
        row["seconds"] = now.seconds
        self.history.append({name: row.get(name) for name in METRICS})
        self.progress = None

    def step(self, x1: torch.Tensor, x2: torch.Tensor) -> float:
        """One optimizer step on two views (N, 3, S, S); returns the loss, the mean of all processes'."""
        m = self.model.momentum(self.global_steps / (self.args.epochs * len(self.loader)))
        with training.autocast(self.device, self.dtype):
            loss = self.parallel(x1, x2, m)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        loss = distributed.all_sum(loss.item())[0] / distributed.world_size()
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at epoch {self.epoch + 1}, step {self.global_steps}, learning rate "
                f"{self.schedule.get_last_lr()[0]:.2e}: lower --learning-rate, warm up longer or use --precision fp32"
            )
        if training.stepped(self.scaler, self.optimizer):
            self.schedule.step()
        return loss

    def finish_epoch(self) -> None:
        """The files, what is measured of the features, and a line of output, whichever are due."""
        row, last = self.history[-1], self.epoch == self.args.epochs
        self.save_epoch()
        if last or self.epoch % self.args.knn_every == 0:
            row |= self.measure()
            self.save_epoch()  # once more, with the measures: had they run out of memory, the epoch would not be lost
        self.save_metrics(METRICS)
        if self.args.tensorboard:
            reports.log_tensorboard(row, self.args.output_dir)
        told = ", ".join(filter(None, (f"loss {row['loss']:.3f}", describe_measures(row))))
        print(f"epoch {self.epoch}: {told}; {reports.describe_times(self.history, self.args.epochs)}")
        if (row.get("effective_rank") or COLLAPSED_RANK) < COLLAPSED_RANK:
            print("  the features have collapsed: lower --learning-rate or warm up longer")

    def save_epoch(self) -> None:
        last = self.epoch == self.args.epochs
        if self.args.lora_rank > 0:
            self.save_adapters()
        elif last or self.epoch % self.args.save_every == 0:
            self.save_checkpoint(complete=last)
        if not last:
            self.save_state()

    def measure(self) -> dict[str, float]:
        """How good the features before the projector are: by labels, which training never sees, or without any."""
        encoder = self.model.encoder_q
        distributed.broadcast(encoder.buffers())  # BatchNorm's statistics, which each process keeps of its own images
        measured = {}
        if self.knn_loaders:
            bank, queries = (
                training.extract_features(encoder, loader, self.device, self.dtype) for loader in self.knn_loaders
            )
            measured["knn_accuracy"] = training.knn_accuracy(*bank, *queries)
            features = bank[0][:: math.ceil(len(bank[0]) / MEASURED_IMAGES)]  # evenly: they are sorted by class
            measured["effective_rank"] = measures.effective_rank(features)
        if self.view_loader:
            first, second = (self.features_of_view(number) for number in (0, 1))
            measured["alignment"] = measures.alignment(first, second)
            measured["uniformity"] = measures.uniformity(first)
            measured["effective_rank"] = measures.effective_rank(first)
        return measured

    def features_of_view(self, number: int) -> torch.Tensor:
        """Features (N, D) of the first or the second view of some images: the same views each time."""
        self.view_loader.batch_sampler.epoch = 0
        view = ((views[number], labels) for views, labels in self.view_loader)
        return training.extract_features(self.model.encoder_q, view, self.device, self.dtype)[0]

    def save_adapters(self) -> None:
        """`moco_lora.pth`, which `finetune_lora.py --stage1-adapter` takes."""
        args = self.args
        if not distributed.is_main():
            return
        metadata = {name: getattr(args, name) for name in ("arch", "image_size", "heads", "moco_version")}
        metadata |= {name: getattr(args, name) for name in ("channels", "channel_fit") if getattr(args, name)}
        metadata |= self.about_images()
        metadata["checkpoint"] = checkpoints.stored_checkpoint(args.checkpoint)
        metadata["lora"] = options.lora_options(args)
        metadata |= {"epoch": self.epoch, "loss": self.history[-1]["loss"], "config": self.identity["config"]}
        LoRAManager(headless(self.model.encoder_q)).save_lora_checkpoint(self.path("moco_lora.pth"), metadata)

    def model_state(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint: all, or over a frozen base those that change, which both encoders have."""
        state = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}  # to be read without a GPU
        if self.args.lora_rank == 0:
            return state
        changing = trained_state(self.model)
        of_keys = {name.replace("encoder_q.", "encoder_k.", 1) for name in changing}
        return {name: tensor for name, tensor in state.items() if name in changing.keys() | of_keys}

    def about_images(self) -> dict[str, Any]:
        """How images are normalised, for those who go on with the backbone."""
        return bands.recorded(self.normalization, vars(self.args))

    def restore_model(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state, strict=self.args.lora_rank == 0)

    def state(self) -> dict[str, Any]:
        about = {"arch": self.args.arch, "normalization": self.about_images()}
        return super().state() | {"epoch": self.epoch, "global_steps": self.global_steps, **about}

    def save_checkpoint(self, complete: bool) -> None:
        """A complete run's has no optimizer: nothing is left to resume, and the file is half as large."""
        state = self.state()
        if complete:
            needless = {*self.trained_parts, *self.other_parts} - {"model", "history"}
            state = {key: value for key, value in state.items() if key not in needless} | {"optimizer": {}}
        if distributed.is_main():
            save_atomically(state, self.path(f"moco_stage1_epoch_{self.epoch}.pth"))

    def resume(self, path: Path, free: Container[str]) -> None:
        """Go on where the run that wrote `path` was; on the CPU to the same bits as without the interruption.

        Raises InputError where that run was configured otherwise or is complete.
        """
        state = read_checkpoint(path, mapped=False)
        if not isinstance(state, dict) or not {"model", "optimizer", "global_steps", "config"} <= state.keys():
            raise InputError(f"--resume {path}: not a checkpoint of python -m moco.pretrain")
        if not state["optimizer"] and state["epoch"]:
            raise InputError(f"--resume {path}: that run is complete; it has nothing to resume")
        if not {"progress", "images", "history"} <= state.keys():
            raise InputError(f"--resume {path}: written by an earlier version, of which no run can be resumed")
        # An option that the run's version did not know has its default; alpha's follows the rank.
        then = vars(config.parse_args(make_parser(), [])[0]) | {"lora_alpha": 16.0} | state["config"]
        progress = state["progress"]
        if progress is not None and "steps" not in progress:  # by an earlier version, for which an epoch always went on
            steps = state["global_steps"] - state["epoch"] * self.steps_per_epoch
            progress = progress | {"steps": steps} if steps else None
        state = {"before": None, "base": {}, "meter": {}, **state, "config": then, "progress": progress}
        self.go_on(path, state, free)

    def results(self) -> dict[str, Any]:
        last, adapters = self.history[-1], self.args.lora_rank > 0
        return {
            **{name: last[name] for name in ("loss", *measures.TITLES)},
            "before": self.baseline,
            "epochs": self.epoch,
            "peak_memory_bytes": training.peak_memory_bytes(self.device),
            "seconds": sum(row["seconds"] for row in self.history),
            **self.meter.results(),
            "checkpoint": self.path("moco_lora.pth" if adapters else f"moco_stage1_epoch_{self.epoch}.pth"),
            "metrics": self.path("metrics.csv"),
            "images": self.identity["images"],
            "normalization": self.about_images(),
            "config": self.identity["config"],
        }

    def loaders(self) -> list[DataLoader]:
        return [loader for loader in (self.loader, *self.knn_loaders, self.view_loader) if loader is not None]


def describe_measures(row: dict[str, float | None]) -> str:
    """What was measured of the features; empty if nothing was."""
    shown = {name: row[name] for name in measures.TITLES if row.get(name) is not None}
    numbers = {name: f"{value:.1%}" if name == "knn_accuracy" else f"{value:.2f}" for name, value in shown.items()}
    return ", ".join(f"{measures.TITLES[name]} {number}" for name, number in numbers.items())


def load_data(
    args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], DataLoader, list[DataLoader], DataLoader | None]:
    """How images are normalised (`bands.settle`), the loader of two views of each, and the loaders for measuring.

    The last are the bank and the queries of the k-NN accuracy, or none without labels; and, if the training images have
    no labels, two views of some of them, or None.
    """
    images, labelled = load_images(args)
    if len(images) < args.batch_size:
        raise InputError(f"--batch-size {args.batch_size}: there are only {len(images)} training images")
    if args.moco_version != 3 and args.queue_size < args.batch_size:  # the version may be the checkpoint's
        raise InputError(f"--queue-size {args.queue_size} is smaller than --batch-size {args.batch_size}; raise it")
    if args.moco_version == 3 and args.batch_size == 1:
        raise InputError("the BatchNorms of MoCo v3's projector need two images: raise --batch-size")
    if args.batch_size % distributed.world_size():
        raise InputError(f"--batch-size {args.batch_size}: not a multiple of the {distributed.world_size()} processes")
    values = bands.settle(args, args.arch, args.channels or 3, images)
    views = transforms.two_crops(args.image_size, args.two_crops, args.crop_min, **values)
    kept = cache_images(images, args.cache_images, args.image_size)
    common = {"batch_size": args.batch_size, "workers": args.workers, "device": device}
    # Without drop_last a small last batch would have few negatives, and BatchNorm little to go by.
    training_views = {"shuffle": True, "seed": args.seed, "drop_last": True, **common}
    loader = data.build_loader(data.Transformed(kept, views), **training_views)
    at_times = {"keep_workers": False}  # they would idle for many epochs
    transform, bounds = transforms.eval_transform(args.image_size, **values), (KNN_BANK, KNN_QUERIES)
    knn_images = [part.at_most(bound) for part, bound in zip(labelled, bounds, strict=False)]
    if distributed.world_size() > min(map(len, knn_images), default=distributed.world_size()):
        raise InputError("the k-NN accuracy has fewer images than there are processes: start fewer")
    knn_loaders = [data.build_loader(data.Transformed(part, transform), **common, **at_times) for part in knn_images]
    if images.labels[0] != data.UNLABELLED:
        return values, loader, knn_loaders, None
    some = data.Transformed(images.at_most(max(MEASURED_IMAGES, args.batch_size)), views)
    return values, loader, knn_loaders, data.build_loader(some, **training_views, **at_times)


def load_images(args: argparse.Namespace) -> tuple[data.LabelledImages, tuple[data.LabelledImages, ...]]:
    """The training images; and a bank and queries with labels, or nothing where no image has one.

    These are a part of the training split each: the held-out split has no part in stage 1, not even to watch it.
    """
    own, read = args.dataset == "imagefolder", options.bands_read(args)
    sources = options.image_sources(args, read)
    if args.dataset == data.UNLABELLED_SET or (own and not data.has_labels(args.data_dir, args.data_list)):
        if problems := options.unlabelled_problems(args):  # whether there are labels may be known only now
            raise InputError("\n".join(problems))
        images, labelled = data.load_unlabelled(args.data_dir, args.data_list, args.skip_unreadable, read), ()
    else:
        splits = data.load_splits(args.dataset, args.data_dir, args.eval_split, **sources, for_training_only=True)
        images = splits.train
        labelled = splits[:2] if args.eval_split == "validation" else data.validation_part(images)
    if args.knn_dir:
        how = {"skip_unreadable": args.skip_unreadable, "bands": read}
        labelled = data.load_splits("imagefolder", args.knn_dir, **how)[:2]
    return images, labelled


def build_model(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, str]:
    """MoCo around a fresh backbone or a checkpoint's, and a line on where it comes from.

    Of `args` it fills in what follows from the checkpoint: arch, image size, version and widths.
    """
    version, parts = checkpoints.load_contrast(args.checkpoint) if args.checkpoint else (None, {})
    args.moco_version = args.moco_version or version or 3
    outputs = [t.shape[0] for name, t in parts.get("projector", {}).items() if name.endswith("weight") and t.dim() == 2]
    args.dim = args.dim or (outputs[-1] if outputs else 256)
    args.mlp_dim = args.mlp_dim or (outputs[0] if len(outputs) > 1 and version == 3 else 4096)
    if args.checkpoint:
        backbone, report = load_base(args.checkpoint, None, 1, *options.backbone_shape(args))
        args.arch, args.image_size, origin = report["arch"], report["image_size"], checkpoints.describe_base(report)
        args.heads = report["heads"] if other_heads(backbone) else None
        args.channels = report["channels"] if report["channels"] != 3 else args.channels
        if args.moco_version == 3 and args.arch.startswith("vit"):  # its positions stay as they are
            backbone.encoder.pos_embedding.requires_grad_(False)
    else:
        args.image_size = args.image_size or default_image_size(args.arch)
        backbone, origin = build_backbone(args.arch, 1, args.image_size, args.heads, args.channels or 3), ""
    if args.lora_rank > 0:
        freeze_backbone_params(add_lora_to_model(backbone, **options.lora_options(args)))
    model = contrast(training.place(backbone, device), args).to(device)
    fuse(model.encoder_k)  # which is frozen
    return model, origin + "".join(start_from(model, parts))


def contrast(backbone: nn.Module, args: argparse.Namespace) -> nn.Module:
    """MoCo of the version asked for. The backbone's classifier head gives way to a projector."""
    if args.moco_version == 3:
        return MoCoV3(backbone, args.dim, args.mlp_dim, args.momentum, args.temperature)
    return MoCo(backbone, args.dim, args.queue_size, args.momentum, args.temperature, mlp=args.moco_version == 2)


def start_from(model: nn.Module, parts: dict[str, dict[str, torch.Tensor]]) -> Iterator[str]:
    """Give projector and predictor the values of a checkpoint, if it has them; says for each what became of it."""
    encoders = (model.encoder_q, model.encoder_k)
    modules = {"projector": [getattr(encoder, head_name(encoder)) for encoder in encoders]}
    modules |= {"predictor": [model.predictor]} if hasattr(model, "predictor") else {}
    for part, tensors in parts.items():
        for module in modules.get(part, ()):
            wanted = {name: t.shape for name, t in module.state_dict().items() if not name.endswith("tracked")}
            fits = wanted == {name: t.shape for name, t in tensors.items() if not name.endswith("tracked")}
            if fits:
                module.load_state_dict(tensors, strict=False)
        if part in modules:
            yield f"; {part} {'taken over' if fits else 'fresh'}"


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=training.fused(model))
    return {"sgd": torch.optim.SGD, "lars": LARS}[args.optimizer](parameters, momentum=0.9, **options)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step has a fixed ratio to the norm of each weight (1708.03888, algorithm 1).

    Biases and normalisation, the parameters of one dimension, take plain steps without weight decay, as in SimCLR.
    """

    def __init__(self, parameters, lr: float, weight_decay: float, momentum: float, trust: float = 0.001):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = p.grad if p.ndim == 1 else self.scaled(p, group)
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
                velocity = self.state[p]["velocity"]
                velocity.mul_(group["momentum"]).add_(update)
                p.sub_(velocity, alpha=group["lr"])

    @staticmethod
    def scaled(p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        update = p.grad + group["weight_decay"] * p
        ratio = group["trust"] * p.norm() / update.norm()
        return update * torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))


if __name__ == "__main__":
    runs.run_script(main)
