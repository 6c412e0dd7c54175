"""Stage 1: pretrain a backbone with MoCo, without labels.

    python -m moco.pretrain --config configs/stage1.yaml                 # the shipped checkpoint: 18 minutes on 2 cores
    python -m moco.pretrain --config configs/stage1.yaml --epochs 1 --warmup-epochs 0   # does it run?
    python -m moco.pretrain --config configs/moco_v2.yaml --data-dir photos     # any images, with or without labels
    python -m moco.pretrain --checkpoint moco_v2_800ep_pretrain.pth.tar --lora-rank 8 --data-dir photos # go on, adapted
    python -m moco.pretrain --config configs/moco_v2.yaml --data-dir /data/imagenet --precision bf16     # on a GPU
    torchrun --nproc-per-node=8 -m moco.pretrain --config configs/moco_v2.yaml --data-dir /data/imagenet # on eight

With --checkpoint a pretraining that has ended goes on with your own images. Without --lora-rank all weights train; with
it only adapters do, over a frozen backbone that queries and keys share.
"""

import functools
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moco.options import PretrainOptions, checkpoint_name, make_parser, read_options, written  # noqa: F401
from toolkit.config import check_command_line

if __name__ == "__main__":  # before PyTorch is loaded, which takes seconds: help and mistakes need not wait for it
    check_command_line(read_options, __doc__)

import torch
from torch import Tensor, nn
from tqdm import tqdm

from finetune_lora import add_lora_to_model, freeze_backbone_params
from lora.fusion import fuse
from lora_utils import LoRAManager, trained_state
from moco.builder import MoCo, MoCoV3
from toolkit import InputError, attributes, config, devices, distributed, files, typed
from toolkit.answers import answer_reports, evaluation, measures
from toolkit.images import bands, data, transforms
from toolkit.images.sources import UNLABELLED_SET, has_labels, load_splits, load_unlabelled, validation_part
from toolkit.models import backbones, checkpoints, norms
from toolkit.run import options, output_folder, reports, run_state, runs, training

# Options that may differ when a run is resumed: they do not change what is computed, and a digest catches another base.
FREE_TO_CHANGE = ("config", "output_dir", "resume", "device", "workers", "knn_every", "knn_dir", "checkpoint")
FREE_TO_CHANGE += options.PLACES_OF_IMAGES
OF_ONE_VERSION = {"queue_size": 2, "mlp_dim": 3}  # options that the other version of MoCo has no use for
KNN_BANK = 50_000  # the most images drawn for the k-NN accuracy: 400 MB of features of a ResNet-50
KNN_QUERIES = 10_000
COLLAPSED_RANK = 2.0  # features of a lower effective rank do not tell images apart
MEASURED_IMAGES = 2_048  # the images on which the effective rank is measured
SAVES_MEMORY = "lower --batch-size (and --learning-rate in proportion) or --image-size, or use --precision bf16"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Pretrain as the options say, and return the content of `results.json`.

    It has `loss`, `knn_accuracy` (0 to 1; None without labels) and `effective_rank` of the last epoch, in `before` the
    same measures of a checkpoint before any step, and the paths `checkpoint` and `metrics`.
    """
    args, sources = read_options(argv, __doc__)
    runs.keep_freed_memory()  # in a notebook too
    device = devices.select_device(args.device)
    dtype = devices.select_precision(args.precision, device)
    distributed.join(device)
    devices.seed_everything(args.seed)
    held = output_folder.held(args.output_dir, written(args), args.resume)
    with runs.faults_explained(device, SAVES_MEMORY), held as begin:
        run = Pretraining(args, device, dtype)
        if args.resume:
            run.resume(args.resume, FREE_TO_CHANGE)
        if args.checkpoint:
            print(run.report["origin"])
        unlabelled = " without labels" if len(run.measuring_loaders) == 1 else ""
        print(f"data: {len(run.loader.dataset):,} images{unlabelled}")
        print(f"model: {run.args.arch}, MoCo v{run.args.moco_version}")
        print(f"device: {device}, precision: {dtype}")
        if run.args.moco_version != 3 and args.queue_size > len(run.loader.dataset):
            print(f"--queue-size {args.queue_size} is more than there are images: it holds an image's own old keys too")
        for name, version in OF_ONE_VERSION.items():
            if sources[name] != "default" and run.args.moco_version != version:
                print(f"{config.flag(name)} has no effect: it is for MoCo v{version}")
        begin()  # an earlier run's checkpoints stay if this run does not write them
        train(run)
        results = run.results()
        if distributed.is_main():
            files.write_text(json.dumps(results, indent=2, default=str), run.path("results.json"))
            reports.plot_pretraining(run.history, run.path("pretraining_curves.png"))
            run.path("last.pth").unlink(missing_ok=True)  # once all is written
            print(f"\n{reports.table(summary(run, results))}")
        return results


def train(run: "Pretraining") -> None:
    """Train the remaining epochs. Raises Stopped after Ctrl-C or SIGTERM, when `last.pth` has the state to resume."""
    args = run.args
    run.begin()
    with run.saved_when_stopped(), norms.constants_kept():
        while run.epoch < args.epochs:
            progress = run.begin_epoch()
            unread = []  # the images of each step, and its loss: see `training.read_figures`
            run.model.train()
            batches = run.meter.timed(run.loader)
            title = f"epoch {run.epoch + 1}/{args.epochs}"
            bar = runs.progress_bar(batches, title, initial=progress.steps, total=run.steps_per_epoch)
            with progress.timed(), bar:
                for number, (views, _) in enumerate(bar, run.global_steps):
                    x1, x2 = (devices.to_device(view, run.device) for view in views)  # two views, (N, 3, S, S) each
                    with devices.autocast(run.device, run.dtype):
                        loss = run.parallel(x1, x2, run.model.momentum(number / run.total_steps))
                    run.optimizer.zero_grad()
                    run.scaler.scale(loss).backward()
                    run.scaler.step(run.optimizer)
                    run.scaler.update()
                    run.schedule.step()

                    unread.append((args.batch_size, [loss.detach()[None]]))
                    is_last = number + 1 == (run.epoch + 1) * run.steps_per_epoch
                    if len(unread) == run.steps_read_together or is_last:
                        run.note_steps(unread, bar)
                        run.stop.check()
            run.end_epoch()


class Pretraining(run_state.RunState):
    """A run of stage 1: the model, its optimizer, its data and its progress. `train` is its loop."""

    def __init__(self, args: PretrainOptions, device: torch.device, dtype: torch.dtype):
        model, args, self.report = build_model(args, device)
        known, read = options.known_image_values(args, args.checkpoint)
        args = replace(args, **known._asdict())
        super().__init__(args, device, dtype)
        self.model = self.network = model
        normalization = self.open_loaders(read)
        self.about_adapters = bands.recorded(normalization, self.report)  # their base may be fitted to the images
        if args.moco_version == 3:
            norms.share_statistics(self.model)  # unshuffled, those of one process could tell which key is whose
        base = backbones.record_of(self.model.encoder_q).base_digests if args.lora_rank > 0 else {}
        steps = len(self.loader)
        self.begin_training(build_optimizer(self.model, args), steps, args.warmup_epochs * steps)
        self.total_steps = args.epochs * steps
        restore = functools.partial(self.model.load_state_dict, strict=args.lora_rank == 0)
        self.trained_entries["model"] = run_state.StateEntry(self.model_state, restore)
        self.identity |= {"images": self.loader.dataset.dataset.digest, "base": base, "arch": args.arch}
        self.identity["normalization"] = bands.recorded(normalization, {})  # for whoever uses the backbone
        self.identity["config"] = {name: config.stored(value) for name, value in vars(args).items()}

    def open_loaders(self, read: bands.Bands | None) -> dict[str, Any]:
        """Make the loader of two views of each image, and the loaders to measure by; return the normalisation."""
        args = self.args
        images, labelled = load_images(args, read)
        check_batch_size(args, len(images))
        values = bands.settle(options.scaling_of(args), args.arch, args.channels or 3, images)
        loading = {"batch_size": args.batch_size, "workers": args.workers, "device": self.device}
        # Without drop_last a small last batch would have few negatives, and BatchNorm little to go by.
        both = data.Transformed(images, transforms.two_crops(args.image_size, args.two_crops, args.crop_min, **values))
        self.loader = data.build_loader(both, shuffle=True, seed=args.seed, drop_last=True, **loading)
        transform = transforms.eval_transform(args.image_size, **values)
        measured = [images.at_most(MEASURED_IMAGES)]
        if labelled:
            measured = [labelled[0].at_most(KNN_BANK), labelled[1].at_most(KNN_QUERIES)]
        if distributed.world_size() > min(map(len, measured)):
            raise InputError("the k-NN accuracy has fewer images than there are processes: start fewer")
        loading["keep_workers"] = False  # they would idle for many epochs
        self.measuring_loaders = [data.build_loader(data.Transformed(some, transform), **loading) for some in measured]
        return values

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return len(self.history)

    @property
    def global_steps(self) -> int:
        return self.epoch * self.steps_per_epoch + (self.progress.steps if self.progress else 0)

    def begin(self) -> None:
        """Measure a checkpoint before training, and make the run resumable, however soon it is killed."""
        if self.args.checkpoint and self.baseline is None:
            self.baseline = self.measure()
            print(f"before training: {describe_measures(self.baseline)}")
        self.save_state()
        is_due = self.history and self.progress is None and self.epoch % self.args.knn_every == 0
        if is_due and self.history[-1]["effective_rank"] is None:  # it was killed while it measured
            self.history[-1] |= self.measure()

    def begin_epoch(self) -> training.Progress:
        """The progress of the epoch that begins or goes on."""
        if self.progress is None:
            self.progress = training.Progress(self.schedule.get_last_lr()[0])
        self.loader.batch_sampler.epoch = self.epoch
        self.loader.batch_sampler.start = self.progress.steps
        return self.progress

    def note_steps(self, unread: list[tuple[int, list[Tensor]]], bar: tqdm) -> None:
        """Count steps and show them. Raises InputError for a loss that is not finite."""
        for images, (loss,) in training.read_figures(unread, self.stop):
            loss /= distributed.world_size()
            if not math.isfinite(loss):  # what was saved before is sound
                rate = self.schedule.base_lrs[0] * self.schedule.lr_lambdas[0](self.global_steps)
                where = f"epoch {self.epoch + 1}, step {self.global_steps}, learning rate {rate:.2e}"
                remedy = "lower --learning-rate, warm up longer or use --precision fp32"
                raise InputError(f"the loss is {loss} at {where}: {remedy}")
            self.progress.add(images, 0, loss)
            speed = self.meter.results()["images_per_second"]
            bar.set_postfix({"loss": f"{loss:.3f}", "img/s": f"{speed:.0f}"} | self.meter.shown(), refresh=False)

    def end_epoch(self) -> None:
        """Add a row to the history, save the files that are due, measure the features if that is due, print a line."""
        now = self.progress
        row = {"epoch": self.epoch + 1, "loss": now.loss_sum / now.steps, **dict.fromkeys(measures.TITLES)}
        row |= {"learning_rate": now.learning_rate, "seconds": now.seconds}
        self.history.append(row)
        self.progress = None
        self.save_epoch()  # before measuring, which may run out of memory
        if self.epoch == self.args.epochs or self.epoch % self.args.knn_every == 0:
            row |= self.measure()
            self.save_epoch()  # again, with the measures
        self.save_metrics()
        print(f"epoch {self.epoch}: {describe_measures(row)}; {reports.describe_times(self.history, self.args.epochs)}")
        if row["effective_rank"] is not None and row["effective_rank"] < COLLAPSED_RANK:
            print("  the features have collapsed: lower --learning-rate or warm up longer")

    def save_epoch(self) -> None:
        """Save the adapters, for --stage1-adapter; and the state to resume or, at the end, the checkpoint."""
        args = self.args
        if args.lora_rank > 0 and distributed.is_main():
            about = attributes(args, "arch", "image_size", "heads", "moco_version")
            about |= self.about_adapters | {"lora": options.lora_options(args)}
            about["checkpoint"] = checkpoints.stored_checkpoint(args.checkpoint)
            about |= {"epoch": self.epoch, "loss": self.history[-1]["loss"], "config": self.identity["config"]}
            manager = LoRAManager(backbones.headless(self.model.encoder_q))
            manager.save_lora_checkpoint(self.path("moco_lora.pth"), about)
        if self.epoch < args.epochs:
            self.save_state()
        elif args.lora_rank == 0 and distributed.is_main():  # half as large: without what only resuming needs
            state = {"model": self.model_state(), "optimizer": {}, "history": self.history} | self.about()
            files.save_atomically(state, self.path(checkpoint_name(args)))

    def measure(self) -> dict[str, float]:
        """Measure the features before the projector, by labels if there are any: training never sees these."""
        encoder = self.model.encoder_q
        distributed.broadcast(encoder.buffers())  # each process has BatchNorm statistics of its own images
        found = [evaluation.extract_features(encoder, each, self.device, self.dtype) for each in self.measuring_loaders]
        features = found[0][0]
        some = features[:: math.ceil(len(features) / MEASURED_IMAGES)]  # spread evenly: they are sorted by class
        measured = {"effective_rank": measures.effective_rank(some)}
        if len(found) > 1:
            measured["knn_accuracy"] = evaluation.knn_accuracy(*found[0], *found[1])
        return measured

    def knn_interval(self, measured: dict[str, float | None]) -> tuple[float, float] | None:
        """The 95% interval of a k-NN accuracy; None without labels."""
        if measured.get("knn_accuracy") is None:
            return None
        share = torch.tensor([measured["knn_accuracy"]], dtype=torch.float64)
        return measures.mean_interval(share, len(self.measuring_loaders[1].dataset))

    def model_state(self) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint: all, or with adapters only those that change, in both encoders."""
        state = self.model.state_dict()
        names = set(state)
        if self.args.lora_rank > 0:
            names = set(trained_state(self.model))
            names |= {name.replace("encoder_q.", "encoder_k.", 1) for name in names}
        return {name: tensor.cpu() for name, tensor in state.items() if name in names}  # readable without a GPU

    def about(self) -> dict[str, Any]:
        """What a checkpoint says apart from its tensors."""
        return {"epoch": self.epoch, "global_steps": self.global_steps, **self.identity}

    def state(self) -> dict[str, Any]:
        return super().state() | self.about()

    def results(self) -> dict[str, Any]:
        last = self.history[-1]
        results = {name: last[name] for name in ("loss", *measures.TITLES)}
        results |= {"knn_interval": self.knn_interval(last), "before": self.baseline, "epochs": self.epoch}
        results |= {"peak_memory_bytes": devices.peak_memory_bytes(self.device), "metrics": self.path("metrics.csv")}
        results |= {"seconds": sum(training.column(self.history, "seconds")), **self.meter.results()}
        results["checkpoint"] = self.path("moco_lora.pth" if self.args.lora_rank > 0 else checkpoint_name(self.args))
        return results | {name: self.identity[name] for name in ("images", "normalization", "config")}


def summary(run: Pretraining, results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The table printed at the end of stage 1: (name, value) of each row."""
    for when, measured in (("before", run.baseline), ("after", run.history[-1])):
        if measured and (interval := run.knn_interval(measured)):
            images = f"of {len(run.measuring_loaders[1].dataset):,} images"
            yield f"k-NN {when}", f"{measured['knn_accuracy']:.1%} {images} ({answer_reports.interval_text(*interval)})"
        elif measured:
            rank = f"{measured['effective_rank']:.1f}; --knn-dir, class folders, would show what that is worth"
            yield f"effective rank {when}", rank
    path = results["checkpoint"]
    base = shlex.quote(str(path))
    if run.args.lora_rank > 0:
        base = f"{shlex.quote(str(run.args.checkpoint))} --stage1-adapter {base}"
    yield "training time", reports.duration(results["seconds"])
    yield "results in", f"{path.parent}/: {path.name}, metrics.csv, results.json, pretraining_curves.png"
    yield "next", f"{typed('finetune')} --data-dir my_images --checkpoint {base}"


def describe_measures(row: dict[str, float | None]) -> str:
    """The loss and the measures of the features in words, as far as they are known."""
    forms = {"loss": "loss {:.3f}", "knn_accuracy": "k-NN {:.1%}", "effective_rank": "effective rank {:.2f}"}
    return ", ".join(form.format(row[name]) for name, form in forms.items() if row.get(name) is not None)


def check_batch_size(args: PretrainOptions, images: int) -> None:
    """Raise InputError for a batch that does not go with the images, the queue or the processes."""
    if images < args.batch_size:
        raise InputError(f"--batch-size {args.batch_size}: there are only {images} training images")
    if args.moco_version != 3 and args.queue_size < args.batch_size:  # the version may be the checkpoint's
        raise InputError(f"--queue-size {args.queue_size} is smaller than --batch-size {args.batch_size}; raise it")
    ends_in_a_pixel = args.lora_rank == 0 and not args.arch.startswith("vit") and args.image_size <= 32
    needed = 2 if args.moco_version == 3 else (1 + ends_in_a_pixel) * distributed.world_size()
    if args.batch_size < needed:  # v3 has BatchNorms in its projector, which share their statistics
        raise InputError(f"BatchNorms need two images, in MoCo v2 in each process: raise --batch-size to {needed}")
    if args.batch_size % distributed.world_size():
        raise InputError(f"--batch-size {args.batch_size}: not a multiple of the {distributed.world_size()} processes")


def load_images(args: PretrainOptions, read: bands.Bands | None) -> tuple[data.LabelledImages, tuple]:
    """The training images, and of them, never of the held-out split, bank and queries; () if no image has a label."""
    is_own = args.dataset == "imagefolder"
    if args.dataset == UNLABELLED_SET or (is_own and not has_labels(args.data_dir, args.data_list)):
        if problems := list(options.unlabelled_problems(args)):  # only now it may be known that there are no labels
            raise InputError("\n".join(problems))
        images = load_unlabelled(args.data_dir, args.data_list, args.skip_unreadable, read)
        labelled = ()
    else:
        splits = load_splits(**options.image_sources(args, read), for_training_only=True)
        images = splits.train
        labelled = splits[:2] if args.eval_split == "validation" else validation_part(images)
    if args.knn_dir:
        labelled = load_splits("imagefolder", args.knn_dir, skip_unreadable=args.skip_unreadable, bands=read)[:2]
    data.keep_decoded(images, *labelled)
    return images, labelled


def build_model(args: PretrainOptions, device: torch.device) -> tuple[nn.Module, PretrainOptions, dict[str, Any]]:
    """Build MoCo; return it, the options with what follows from the checkpoint, and the report of `load_backbone`."""
    version, parts = checkpoints.load_contrast(args.checkpoint) if args.checkpoint else (None, {})
    projector = parts.get("projector", {}).items()
    outputs = [tensor.shape[0] for name, tensor in projector if name.endswith("weight") and tensor.dim() == 2]
    dim = outputs[-1] if outputs else 256
    mlp_dim = outputs[0] if len(outputs) > 1 and version == 3 else 4096
    checkpoint = args.checkpoint or checkpoints.NO_CHECKPOINT
    backbone, report = checkpoints.load_backbone(checkpoint, 1, **options.backbone_shape(args))
    settled = {"moco_version": args.moco_version or version or 3, "arch": report["arch"]}
    settled["heads"] = backbones.record_of(backbone).heads
    if report["channels"] != 3:
        settled["channels"] = report["channels"]
    settled |= {"image_size": report["image_size"], "dim": args.dim or dim, "mlp_dim": args.mlp_dim or mlp_dim}
    args = replace(args, **settled)
    if args.checkpoint and args.moco_version == 3 and args.arch.startswith("vit"):
        backbone.encoder.pos_embedding.requires_grad_(False)  # the checkpoint's positions stay as they are
    if args.lora_rank > 0:
        freeze_backbone_params(add_lora_to_model(backbone, **options.lora_options(args)))
    backbone = devices.place(backbone, device)
    if args.moco_version == 3:
        model = MoCoV3(backbone, args.dim, args.mlp_dim, args.momentum, args.temperature)
    else:
        model = MoCo(backbone, args.dim, args.queue_size, args.momentum, args.temperature)
    model.to(device)
    fuse(model.encoder_k)  # it gets no gradient
    report["origin"] = checkpoints.describe_base(report) + "".join(start_from(model, parts))
    return model, args, report


def start_from(model: nn.Module, parts: dict[str, dict[str, torch.Tensor]]) -> Iterator[str]:
    """Load projector and predictor from a checkpoint, if it has fitting ones; yield what became of each."""
    encoders = (model.encoder_q, model.encoder_k)
    modules = {"projector": [encoder.get_submodule(backbones.head_name(encoder)) for encoder in encoders]}
    if hasattr(model, "predictor"):
        shorter = model.predictor[:-1]  # the official ones of ResNets end without a BatchNorm
        if checkpoints.shapes_of(shorter.state_dict()) == checkpoints.shapes_of(parts.get("predictor", {})):
            model.predictor = shorter
        modules["predictor"] = [model.predictor]
    for part in filter(modules.__contains__, parts):
        for module in modules[part]:
            fits = checkpoints.shapes_of(module.state_dict()) == checkpoints.shapes_of(parts[part])
            if fits:
                module.load_state_dict(parts[part])
        yield f"; {part} {'taken over' if fits else 'fresh'}"


def build_optimizer(model: nn.Module, args: PretrainOptions) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.SGD(parameters, momentum=0.9, **options)


if __name__ == "__main__":
    runs.run_script(main)
