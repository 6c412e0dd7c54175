"""Stage 1: pretrain a backbone with MoCo, without labels.

    python -m moco.pretrain --config configs/stage1.yaml                 # the shipped checkpoint: 18 minutes on 2 cores
    python -m moco.pretrain --config configs/stage1.yaml --epochs 1 --warmup-epochs 0   # does it run?
    python -m moco.pretrain --config configs/stage1.yaml --resume        # go on where it was stopped
    python -m moco.pretrain --config configs/moco_v2.yaml --data-dir photos     # any images, with or without labels
    python -m moco.pretrain --checkpoint moco_v2_800ep_pretrain.pth.tar --lora-rank 8 --data-dir photos # go on, adapted
    python -m moco.pretrain --config configs/moco_v2.yaml --data-dir /data/imagenet --precision bf16     # on a GPU
    torchrun --nproc-per-node=8 -m moco.pretrain --config configs/moco_v2.yaml --data-dir /data/imagenet # on eight

With --checkpoint a pretraining that has ended goes on with your own images. Without --lora-rank all weights train; with
it only adapters do, over a frozen backbone that queries and keys share.

Every option is a flag and a key of the configuration file, whose sections are the groups below (see --help).
"""

import argparse
import json
import math
import os
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from finetune_lora import add_lora_to_model, freeze_backbone_params, load_base
from lora.fusion import fuse
from lora_utils import LoRAManager, trained_state
from moco.builder import MoCo, MoCoV3
from toolkit import InputError, config, devices, distributed
from toolkit.answers import evaluation, measures
from toolkit.config import non_negative_float, non_negative_int, positive_float, positive_int
from toolkit.files import read_checkpoint, save_atomically, write_text
from toolkit.images import bands, data, transforms
from toolkit.models import checkpoints
from toolkit.models.backbones import ARCHS, build_backbone, default_image_size, head_name, headless, other_heads
from toolkit.models.norms import share_statistics
from toolkit.run import late, optim, options, output_folder, reports, runs, training
from toolkit.run.run_state import Part, RunState

# Options that may differ when a run is resumed, because they do not change what is computed.
FREE_TO_CHANGE = {"config", "output_dir", "resume", "device", "workers", "knn_every", "knn_dir", "save_every"}
FREE_TO_CHANGE |= {"tensorboard", "checkpoint"}  # a digest catches another base
FREE_TO_CHANGE |= set(options.PLACES_OF_IMAGES)
METRICS = ("epoch", "loss", *measures.TITLES, "learning_rate", "seconds")
OPTIMIZERS = ("adamw", "sgd", "lars")
# The most images drawn for the k-NN accuracy: 400 MB of features of a ResNet-50.
KNN_BANK, KNN_QUERIES = 50_000, 10_000
COLLAPSED_RANK = 2.0  # features of a lower effective rank do not tell images apart
MEASURED_IMAGES = 2_048  # the images on which alignment, uniformity and effective rank are measured
SAVES_MEMORY = "lower --batch-size (and --learning-rate in proportion) or --image-size, or use --precision bf16"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pretrain as the options say.

    Returns:
        The content of `results.json`. From the last epoch: `loss`, `knn_accuracy` (0 to 1; None without labels),
        `effective_rank` and, without labels, `alignment` and `uniformity` (`answers.measures`). `before`: the same
        measures of a checkpoint before any step. Then `epochs`, `seconds`, `images_per_second`, `waiting_share`,
        `peak_memory_bytes`, and the paths `checkpoint` (with adapters, of `moco_lora.pth`) and `metrics`.
    """
    args, _ = config.parse_args(make_parser(), argv, check=complete)
    device = devices.select_device(args.device)
    dtype = devices.select_precision(args.precision, device)
    distributed.join(device)
    devices.seed_everything(args.seed)
    held = output_folder.held(args.output_dir, "moco.pretrain", list(written(args)), args.resume)
    with runs.faults_explained(device, SAVES_MEMORY) as loaders, held as begin:
        run = Pretraining(args, device, dtype)
        loaders += run.loaders()
        if args.resume:
            run.resume(args.resume, FREE_TO_CHANGE)
        if args.checkpoint:
            print(run.origin)
        unlabelled = "" if run.knn_loaders else " without labels"
        print(f"data: {len(run.loader.dataset):,} images{unlabelled}")
        print(f"model: {args.arch}, MoCo v{args.moco_version}")
        print(devices.describe_device(device, dtype))
        if args.moco_version != 3 and args.queue_size > len(run.loader.dataset):
            print(
                f"--queue-size {args.queue_size} is more than there are images: it holds an image's own older keys too"
            )
        begin()  # an earlier run's checkpoints stay if this run does not write them
        run.train()
        if distributed.is_main():
            write_text(json.dumps(run.results(), indent=2, default=str), run.path("results.json"))
            reports.plot_pretraining(run.history, run.path("pretraining_curves.png"))
        return run.results()


def complete(args: argparse.Namespace, sources: dict[str, str]) -> list[str]:
    """Fill in the options that follow from others; return what is wrong with them together, one line each."""
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
    """The names of the files that a run writes to --output-dir; of the checkpoints, those that exist already."""
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
    moco.add_argument("--schedule", choices=optim.SCHEDULES, default="cosine")
    moco.add_argument("--warmup-epochs", type=non_negative_int, default=0)
    moco.add_argument("--precision", choices=devices.PRECISIONS, default="auto")
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
    """A run of stage 1: the model, its optimizer, its data and its progress."""

    FILES = ("moco_lora.pth", "last.pth", "metrics.csv", "results.json", "pretraining_curves.png", "tensorboard")

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
        super().__init__(args, device, dtype)
        self.model, self.origin = build_model(args, device)
        self.normalization, self.loader, self.knn_loaders, self.view_loader = load_data(args, device)
        if args.moco_version == 3:
            # v3 does not shuffle, so statistics of one process could tell which key belongs to which query.
            share_statistics(self.model)
        base = getattr(self.model.encoder_q, "base_digests", {}) if args.lora_rank > 0 else {}
        steps = len(self.loader)
        self.begin_training(self.model, build_optimizer(self.model, args), steps, args.warmup_epochs * steps)
        self.trained_parts["model"] = Part(self.model_state, self.restore_model)
        images = self.loader.dataset.dataset.digest
        self.identity |= {"images": images, "base": base}
        self.identity["config"] = {name: config.stored(value) for name, value in vars(args).items()}

    def train(self) -> None:
        """Train the remaining epochs. Until the last one ends, `last.pth` has the state to resume.

        Raises:
            Stopped: after Ctrl-C or SIGTERM, when the step is done and `last.pth` is written.
        """
        if self.args.checkpoint and self.baseline is None:
            self.baseline = self.measure()
            print(f"before training: {describe_measures(self.baseline)}")
        if self.global_steps == 0:
            self.save_state()  # from here on the run can be resumed whenever it is killed
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
        """Train the rest of a pass over the images, and add a row to the history."""
        epoch = self.epoch + 1
        if self.progress is None:
            self.progress = training.Progress(self.schedule.get_last_lr()[0])
        now = self.progress
        self.loader.batch_sampler.epoch = self.epoch
        self.loader.batch_sampler.start = now.steps
        self.model.train()
        title = f"epoch {epoch}/{self.args.epochs}"
        counts = {"initial": now.steps, "total": self.steps_per_epoch}
        with now.timed(), runs.progress_bar(self.meter.watched(self.loader), title, **counts) as bar:
            numbered = enumerate((views for views, _ in bar), self.global_steps)
            batches = ((number, self.schedule.get_last_lr()[0], views) for number, views in numbered)
            for (number, rate, _), (loss,) in late.one_step_late(batches, self.step, self.stop):
                loss /= distributed.world_size()
                if not math.isfinite(loss):  # what was saved before is sound
                    raise InputError(
                        f"the loss is {loss} at epoch {epoch}, step {number}, learning rate {rate:.2e}: "
                        "lower --learning-rate, warm up longer or use --precision fp32"
                    )
                now.add(self.args.batch_size, 0, loss)
                speed = self.meter.results()["images_per_second"]
                shown = {"loss": f"{loss:.3f}", "img/s": f"{speed:.0f}"}
                bar.set_postfix(shown | self.meter.shown(), refresh=False)
            self.stop.check()
        row = {"epoch": epoch, "loss": now.loss_sum / now.steps, "learning_rate": now.learning_rate}
        row["seconds"] = now.seconds
        self.history.append({name: row.get(name) for name in METRICS})
        self.progress = None

    def step(self, batch: tuple[int, float, Sequence[torch.Tensor]]) -> late.Figures:
        """Take the optimizer step of this number on two views (N, 3, S, S); return the loss, unread."""
        number, _, views = batch
        x1, x2 = (devices.to_device(view, self.device) for view in views)
        m = self.model.momentum(number / (self.args.epochs * len(self.loader)))
        with devices.autocast(self.device, self.dtype):
            loss = self.parallel(x1, x2, m)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if optim.stepped(self.scaler, self.optimizer):
            self.schedule.step()
        return late.Figures([loss.detach()[None]], self.stop.signum > 0)

    def finish_epoch(self) -> None:
        """Save the files that are due, measure the features if that is due, and print a line."""
        row = self.history[-1]
        is_last = self.epoch == self.args.epochs
        self.save_epoch()  # before measuring, which may run out of memory
        if is_last or self.epoch % self.args.knn_every == 0:
            row |= self.measure()
            self.save_epoch()  # again, with the measures
        self.save_metrics(METRICS)
        if self.args.tensorboard:
            reports.log_tensorboard(row, self.args.output_dir)
        measured = describe_measures(row)
        figures = f"loss {row['loss']:.3f}" + (f", {measured}" if measured else "")
        print(f"epoch {self.epoch}: {figures}; {reports.describe_times(self.history, self.args.epochs)}")
        rank = row.get("effective_rank")
        if rank and rank < COLLAPSED_RANK:
            print("  the features have collapsed: lower --learning-rate or warm up longer")

    def save_epoch(self) -> None:
        """Save the adapters, or a checkpoint if it is due; and the state to resume, unless the run is complete."""
        is_last = self.epoch == self.args.epochs
        if self.args.lora_rank > 0:
            self.save_adapters()
        elif is_last or self.epoch % self.args.save_every == 0:
            self.save_checkpoint(complete=is_last)
        if not is_last:
            self.save_state()

    def measure(self) -> dict[str, float]:
        """Measure the features before the projector, by labels if there are any: training never sees these."""
        encoder = self.model.encoder_q
        distributed.broadcast(encoder.buffers())  # each process has BatchNorm statistics of its own images
        measured = {}
        if self.knn_loaders:
            bank_loader, query_loader = self.knn_loaders
            features, labels = evaluation.extract_features(encoder, bank_loader, self.device, self.dtype)
            queries = evaluation.extract_features(encoder, query_loader, self.device, self.dtype)
            measured["knn_accuracy"] = evaluation.knn_accuracy(features, labels, *queries)
            some = features[:: math.ceil(len(features) / MEASURED_IMAGES)]  # spread evenly: they are sorted by class
            measured["effective_rank"] = measures.effective_rank(some)
        if self.view_loader:
            first = self.features_of_view(0)
            second = self.features_of_view(1)
            measured["alignment"] = measures.alignment(first, second)
            measured["uniformity"] = measures.uniformity(first)
            measured["effective_rank"] = measures.effective_rank(first)
        return measured

    def features_of_view(self, number: int) -> torch.Tensor:
        """Features (N, D) of the first (0) or the second view (1) of some images: the same views each time."""
        self.view_loader.batch_sampler.epoch = 0
        view = ((views[number], labels) for views, labels in self.view_loader)
        return evaluation.extract_features(self.model.encoder_q, view, self.device, self.dtype)[0]

    def save_adapters(self) -> None:
        """Write `moco_lora.pth`, which `finetune_lora.py --stage1-adapter` reads."""
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
        """The tensors of a checkpoint: all, or with adapters only those that change, in both encoders."""
        state = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}  # readable without a GPU
        if self.args.lora_rank == 0:
            return state
        changing = trained_state(self.model)
        of_keys = {name.replace("encoder_q.", "encoder_k.", 1) for name in changing}
        return {name: tensor for name, tensor in state.items() if name in changing.keys() | of_keys}

    def about_images(self) -> dict[str, Any]:
        """The metadata on how images are normalised, for whoever uses the backbone."""
        return bands.recorded(self.normalization, vars(self.args))

    def restore_model(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state, strict=self.args.lora_rank == 0)

    def state(self) -> dict[str, Any]:
        about = {"arch": self.args.arch, "normalization": self.about_images()}
        return super().state() | {"epoch": self.epoch, "global_steps": self.global_steps, **about}

    def save_checkpoint(self, complete: bool) -> None:
        """Write a checkpoint. That of a complete run is half as large: it lacks what only resuming needs."""
        state = self.state()
        if complete:
            needless = {*self.trained_parts, *self.other_parts} - {"model", "history"}
            state = {key: value for key, value in state.items() if key not in needless} | {"optimizer": {}}
        if distributed.is_main():
            save_atomically(state, self.path(f"moco_stage1_epoch_{self.epoch}.pth"))

    def resume(self, path: Path, free: Container[str]) -> None:
        """Resume the run that wrote `path`; on the CPU, to the same bits as without the interruption.

        Raises InputError if that run was configured otherwise or is complete.
        """
        state = read_checkpoint(path, mapped=False)
        if not isinstance(state, dict) or not {"model", "optimizer", "global_steps", "config"} <= state.keys():
            raise InputError(f"--resume {path}: not a checkpoint of python -m moco.pretrain")
        if not state["optimizer"] and state["epoch"]:
            raise InputError(f"--resume {path}: that run is complete; it has nothing to resume")
        if not {"progress", "images", "history"} <= state.keys():
            raise InputError(f"--resume {path}: written by an earlier version, of which no run can be resumed")
        # An option that the run's version did not know has its default; that of alpha follows the rank.
        then = vars(config.parse_args(make_parser(), [])[0]) | {"lora_alpha": 16.0} | state["config"]
        progress = state["progress"]
        if progress is not None and "steps" not in progress:  # an earlier version wrote it, with an epoch always begun
            steps = state["global_steps"] - state["epoch"] * self.steps_per_epoch
            progress = progress | {"steps": steps} if steps else None
        state = {"before": None, "base": {}, "meter": {}, **state, "config": then, "progress": progress}
        self.go_on(path, state, free)

    def results(self) -> dict[str, Any]:
        last = self.history[-1]
        file = "moco_lora.pth" if self.args.lora_rank > 0 else f"moco_stage1_epoch_{self.epoch}.pth"
        return {
            **{name: last[name] for name in ("loss", *measures.TITLES)},
            "before": self.baseline,
            "epochs": self.epoch,
            "peak_memory_bytes": devices.peak_memory_bytes(self.device),
            "seconds": sum(row["seconds"] for row in self.history),
            **self.meter.results(),
            "checkpoint": self.path(file),
            "metrics": self.path("metrics.csv"),
            "images": self.identity["images"],
            "normalization": self.about_images(),
            "config": self.identity["config"],
        }

    def loaders(self) -> list[DataLoader]:
        return [loader for loader in (self.loader, *self.knn_loaders, self.view_loader) if loader is not None]


def describe_measures(row: dict[str, float | None]) -> str:
    """The measures of the features in words; empty if none was taken."""
    shown = {name: row[name] for name in measures.TITLES if row.get(name) is not None}
    numbers = {name: f"{value:.1%}" if name == "knn_accuracy" else f"{value:.2f}" for name, value in shown.items()}
    return ", ".join(f"{measures.TITLES[name]} {number}" for name, number in numbers.items())


def load_data(
    args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], DataLoader, list[DataLoader], DataLoader | None]:
    """The normalisation (`bands.settle`), the loader of two views of each image, and the loaders for measuring.

    The third value has the loaders of bank and queries of the k-NN accuracy; it is empty without labels. The fourth
    loads two views of some training images if these have no labels, and is None otherwise.
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
    common = {"batch_size": args.batch_size, "workers": args.workers, "device": device}
    # Without drop_last a small last batch would have few negatives, and BatchNorm little to go by.
    training_views = {"shuffle": True, "seed": args.seed, "drop_last": True, **common}
    loader = data.build_loader(data.Transformed(images, views), **training_views)
    at_times = {"keep_workers": False}  # they would idle for many epochs
    transform = transforms.eval_transform(args.image_size, **values)
    knn_images = [part.at_most(most) for part, most in zip(labelled, (KNN_BANK, KNN_QUERIES), strict=False)]
    if distributed.world_size() > min(map(len, knn_images), default=distributed.world_size()):
        raise InputError("the k-NN accuracy has fewer images than there are processes: start fewer")
    knn_loaders = [data.build_loader(data.Transformed(part, transform), **common, **at_times) for part in knn_images]
    if images.labels[0] != data.UNLABELLED:
        return values, loader, knn_loaders, None
    some = data.Transformed(images.at_most(max(MEASURED_IMAGES, args.batch_size)), views)
    return values, loader, knn_loaders, data.build_loader(some, **training_views, **at_times)


def load_images(args: argparse.Namespace) -> tuple[data.LabelledImages, tuple[data.LabelledImages, ...]]:
    """The training images; and bank and queries with labels, or an empty tuple if no image has a label.

    Bank and queries are parts of the training split: stage 1 never reads the held-out split, not even to measure.
    """
    is_own = args.dataset == "imagefolder"
    read = options.bands_read(args)
    sources = options.image_sources(args, read)
    if args.dataset == data.UNLABELLED_SET or (is_own and not data.has_labels(args.data_dir, args.data_list)):
        if problems := options.unlabelled_problems(args):  # only now it may be known that there are no labels
            raise InputError("\n".join(problems))
        images = data.load_unlabelled(args.data_dir, args.data_list, args.skip_unreadable, read)
        labelled = ()
    else:
        splits = data.load_splits(args.dataset, args.data_dir, args.eval_split, **sources, for_training_only=True)
        images = splits.train
        labelled = splits[:2] if args.eval_split == "validation" else data.validation_part(images)
    if args.knn_dir:
        how = {"skip_unreadable": args.skip_unreadable, "bands": read}
        labelled = data.load_splits("imagefolder", args.knn_dir, **how)[:2]
    return images, labelled


def build_model(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, str]:
    """Build MoCo around a new backbone or a checkpoint's; return it and a line on where its weights come from.

    Fills in the options that follow from the checkpoint: arch, image size, version and widths.
    """
    version, parts = None, {}
    if args.checkpoint:
        version, parts = checkpoints.load_contrast(args.checkpoint)
    args.moco_version = args.moco_version or version or 3
    projector = parts.get("projector", {}).items()
    outputs = [tensor.shape[0] for name, tensor in projector if name.endswith("weight") and tensor.dim() == 2]
    args.dim = args.dim or (outputs[-1] if outputs else 256)
    has_hidden_width = len(outputs) > 1 and version == 3
    args.mlp_dim = args.mlp_dim or (outputs[0] if has_hidden_width else 4096)
    origin = ""
    if args.checkpoint:
        backbone, report = load_base(args.checkpoint, None, 1, *options.backbone_shape(args))
        origin = checkpoints.describe_base(report)
        args.arch = report["arch"]
        args.image_size = report["image_size"]
        args.heads = report["heads"] if other_heads(backbone) else None
        if report["channels"] != 3:
            args.channels = report["channels"]
        if args.moco_version == 3 and args.arch.startswith("vit"):  # leave the checkpoint's positions as they are
            backbone.encoder.pos_embedding.requires_grad_(False)
    else:
        args.image_size = args.image_size or default_image_size(args.arch)
        backbone = build_backbone(args.arch, 1, args.image_size, args.heads, args.channels or 3)
    if args.lora_rank > 0:
        freeze_backbone_params(add_lora_to_model(backbone, **options.lora_options(args)))
    model = contrast(devices.place(backbone, device), args).to(device)
    fuse(model.encoder_k)  # it gets no gradient
    return model, origin + "".join(start_from(model, parts))


def contrast(backbone: nn.Module, args: argparse.Namespace) -> nn.Module:
    """MoCo in the version asked for. A projector replaces the backbone's classifier head."""
    if args.moco_version == 3:
        return MoCoV3(backbone, args.dim, args.mlp_dim, args.momentum, args.temperature)
    return MoCo(backbone, args.dim, args.queue_size, args.momentum, args.temperature, mlp=args.moco_version == 2)


def start_from(model: nn.Module, parts: dict[str, dict[str, torch.Tensor]]) -> Iterator[str]:
    """Load projector and predictor from a checkpoint, if it has fitting ones; yield what became of each."""
    encoders = (model.encoder_q, model.encoder_k)
    modules = {"projector": [getattr(encoder, head_name(encoder)) for encoder in encoders]}
    modules |= {"predictor": [model.predictor]} if hasattr(model, "predictor") else {}
    for part, tensors in parts.items():
        for module in modules.get(part, ()):
            fits = _shapes(module.state_dict()) == _shapes(tensors)
            if fits:
                module.load_state_dict(tensors, strict=False)
        if part in modules:
            yield f"; {part} {'taken over' if fits else 'fresh'}"


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """The shapes of tensors by name, without BatchNorm's counters, which some files lack."""
    return {name: tensor.shape for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=optim.fused(model))
    return {"sgd": torch.optim.SGD, "lars": LARS}[args.optimizer](parameters, momentum=0.9, **options)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps have a fixed ratio to the norm of each weight (1708.03888, algorithm 1).

    Parameters of one dimension, biases and normalisation, take plain steps without weight decay, as in SimCLR.
    """

    def __init__(self, parameters, lr: float, weight_decay: float, momentum: float, trust: float = 0.001):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            matrices, plain = ([p for p in parameters if (p.ndim == 1) == flat] for flat in (False, True))
            updates = (self.scaled(matrices, group) if matrices else []) + [p.grad for p in plain]
            for p in parameters:
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            parameters = matrices + plain
            velocities = [self.state[p]["velocity"] for p in parameters]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates)
            torch._foreach_add_(parameters, velocities, alpha=-group["lr"])

    @staticmethod
    def scaled(parameters: list[torch.Tensor], group: dict[str, Any]) -> list[torch.Tensor]:
        """The update of each parameter, in the trust ratio to it."""
        updates = torch._foreach_add([p.grad for p in parameters], parameters, alpha=group["weight_decay"])
        of_weights, of_updates = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, updates))
        ratios = group["trust"] * of_weights / of_updates
        ratios = torch.where(torch.isfinite(ratios) & (ratios > 0), ratios, torch.ones_like(ratios))
        return list(torch._foreach_mul(updates, ratios.unbind()))


if __name__ == "__main__":
    runs.run_script(main)
