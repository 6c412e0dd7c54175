"""Use an adapter file after training: inspect it, answer for images, and export it to files that need no toolkit.

    python deploy_lora.py info checkpoints/lora/lora.pth                        # what is in the file
    python deploy_lora.py evaluate checkpoints/lora/lora.pth my_labelled_images # how good its answers are
    python deploy_lora.py threshold checkpoints/lora/lora.pth list.csv --goal sensitivity=0.95 --output lora95.pth
    python deploy_lora.py compare one/results.json other/results.json           # is the other better, or was it chance
    python deploy_lora.py predict checkpoints/lora/lora.pth my_images --output predictions.csv
    python deploy_lora.py embed checkpoints/lora/lora.pth my_images --output features.npy
    python deploy_lora.py choose moco_v2_800ep_pretrain.pth.tar my_images --count 50 --output to_label  # what to label
    python deploy_lora.py explain checkpoints/lora/lora.pth my_images --output explained
    python deploy_lora.py demo checkpoints/lora/lora.pth                        # a page on which an image is dropped
    python deploy_lora.py merge checkpoints/lora/lora.pth --output merged.pth   # one state_dict for plain torchvision
    python deploy_lora.py export checkpoints/lora/lora.pth --output model.onnx  # or model.pt2, for torch.export.load
    python deploy_lora.py convert checkpoints/lora/lora.pth --to peft --output peft_adapter
    python deploy_lora.py card checkpoints/lora/lora.pth --output card.md       # a model card

Every command takes the file of any run: LoRA, QLoRA or full fine-tuning.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import os
import reprlib
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import moco_lora  # noqa: F401 - it says if a folder is in the way of those that follow
from toolkit.config import check_command_line, flag
from toolkit.run.commands import MAP_SUFFIXES, ON_IMAGES, SUFFIXES, check, make_parser, read_options  # noqa: F401

if __name__ == "__main__":  # before PyTorch is loaded, which takes seconds: help and mistakes need not wait for it
    check_command_line(read_options, __doc__)

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.resnet import ResNet

from finetune_lora import adapt_layers, load_base, load_finetuned, multiply_in_8_bits
from lora import adapter_file, initialization, peft_format
from lora.adapted import LoRASettings, adaptable_layers, is_adapted, recorded_in_4_bits
from lora_utils import LoRAManager, find_base, full_rank, model_shape, read_adapter_file
from toolkit import InputError, devices, did_you_mean, distributed, dotted, files, listed, optional_package, printable
from toolkit.answers import choosing, comparison, evaluation, heat_maps, model_card, predictions, probe, tasks
from toolkit.answers import demo as demo_page
from toolkit.answers.report_page import PICTURE_ALONE, drawn, new_figure, save_figure, write_page
from toolkit.images import bands, folders, lists, masks, remote, scenes, shards, sources, splitting, transforms
from toolkit.images.data import LabelledImages, TolerantImages, Transformed, among, build_loader, fixed_order_batch
from toolkit.models.backbones import block_names, headless, in_head, input_channels, other_heads
from toolkit.models.checkpoints import state_digest, value_at
from toolkit.models.names import TIMM, is_none
from toolkit.models.norms import freeze_statistics
from toolkit.run import commands, loaders, options, output_folder, reports, runs

PART_IMAGES = 10_000  # or some fewer, in a file of a folder of answers
SMALLEST = 33  # pixels along a side, from which on a ResNet's last map is no single point, whose enlarging differs
ROUNDING = 1e-3  # the largest difference of PEFT's answers, relative to their size, that rounding explains


def info(args: argparse.Namespace) -> dict[str, Any]:
    """Print the content of an adapter file and return it."""
    content = read_adapter_file(args.adapter)
    numel = sum(map(torch.numel, content["tensors"].values()))
    adapted = sum(record["r"] > 0 for record in content["layers"].values())
    print(f"{args.adapter}: {adapted} adapted layers, {numel:,} parameters, {args.adapter.stat().st_size / 1e6:.2f} MB")
    metadata = dict(content["metadata"])
    config = metadata.pop("config", None)
    sections = config.items() if isinstance(config, dict) else ()
    for key, value in (*metadata.items(), *sections):
        text = f"{printable(key)}: {printable(_SHORT.repr(value), 4000)}"
        print(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False))
    for name, record in content["layers"].items():
        how = f"r={record['r']}, scaling={record['scaling']:g}" if record["r"] else "frozen in 4 bits"
        print(f"  {printable(name)}: {printable(record['kind'])}, {how}")
    return content


_SHORT = reprlib.Repr()  # a list may contain the same list many times: a few hundred bytes could fill the memory
vars(_SHORT).update(maxlevel=3, maxlist=100, maxdict=100, maxstring=200, maxother=200)

# -------------------------------------------------------------------------------------------------- answers for images


@dataclass
class Deployed:
    """A merged model on its device, what its file says of it, and the options of the command."""

    args: argparse.Namespace
    model: nn.Module
    about: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self):
        self.task = _task_of(self.about)
        self.transform = self.about["transform"]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Tensor:
        """The model's outputs for images (N, C, H, W), float32: (N, ...)."""
        return evaluation.computed(self.model, images, self.device, self.dtype).float()

    def answers(self, images: LabelledImages) -> Any:
        """The task's answers for labelled images."""
        bar = runs.progress_bar(self.loader(Transformed(images, self.transform)), "evaluate")
        return self.task.evaluate(self.model, bar, self.device, self.dtype)

    def loader(self, images: Transformed, **loading: Any) -> DataLoader:
        loading |= {"batch_size": self.args.batch_size, "workers": self.args.workers, "device": self.device}
        if self.task.per_pixel and images.dataset.source.largest > self.model.window**2:  # whole images, as in a run
            loading["batch_size"] = 1
        return build_loader(images, collate=images.dataset.collate, **loading)

    def explainer(self) -> heat_maps.Explainer:
        values = bands.from_metadata(self.about) | {"window": self.model.window if self.task.per_pixel else None}
        return heat_maps.Explainer(self.model, self.transform, self.device, self.dtype, **values)

    def windows_answered(self, windows: Tensor) -> Tensor:
        """The outputs for windows of an image, which may be more than a batch, on the CPU."""
        return torch.cat([self.outputs(some).cpu() for some in windows.split(self.args.batch_size)])


@contextlib.contextmanager
def _deployed(args: argparse.Namespace) -> Iterator[Deployed]:
    """Yield the model on --device; faults get a remedy."""
    device = devices.select_device(args.device)
    devices.check_arithmetic(args.arithmetic, device)
    distributed.join(device)
    with runs.faults_explained(device, "lower --batch-size"):
        model, about = _loaded(args)
        if args.arithmetic == "int8":
            multiply_in_8_bits(model)
        else:
            LoRAManager(model).merge_lora_weights()
        dtype = devices.select_precision(args.precision, device)
        yield Deployed(args, devices.place(model, device), about, device, dtype)


def _loaded(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model of an adapter file, or of a checkpoint to choose by, which has no classes; and what is known of it."""
    if args.command != "choose" or adapter_file.holds_adapter(args.adapter):
        if given := list(filter(vars(args).get, commands.OF_CHECKPOINT)):
            raise InputError(f"{listed(map(flag, given))}: for a checkpoint, and {args.adapter} has its own; drop it")
        return load_finetuned(args.adapter, args.checkpoint)
    of_checkpoint = {name: vars(args)[name] for name in commands.OF_CHECKPOINT}
    settings = options.FineTuneOptions(checkpoint=args.adapter, **of_checkpoint)
    known, read = options.known_image_values(settings, args.adapter)
    model, report = load_base(args.adapter, None, 2, **options.backbone_shape(settings))
    size = report["image_size"]
    about = {"class_names": [], "image_size": size, "transform": transforms.eval_transform(size, bands=read)}
    values = bands.settle(known, report["arch"], report["channels"], _images(args.images, about))
    return model.eval(), about | {"transform": transforms.eval_transform(size, **values)}


def _task_of(about: dict[str, Any]) -> tasks.Task:
    return tasks.from_record(about.get("task"), about["class_names"], "the adapter")


def _refuse_pixels(about: dict[str, Any], command: str) -> None:
    if _task_of(about).per_pixel:
        raise InputError(f"{command} is not for an adapter with a class for every pixel: use predict, merge or export")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the adapter on labelled images: print the measures, write a page about them, and return them."""
    with _deployed(args) as deployed:
        task = deployed.task
        images, where, result = _evaluated(deployed)
        explainer = deployed.explainer() if task.counts_images and block_names(deployed.model) else None
    if not distributed.is_main():
        return {}
    report = task.report(result, images.clusters())
    results = {"task": task.kind, "images": len(images), "loss": result.loss, **report.figures()}
    *_, page = commands.files_written(args)
    if args.output is not None:
        with files.open_atomically(args.output) as file:  # takes its place last, and none without its answers
            file.write(json.dumps(results, indent=2).encode())
            comparison.write_answers(report.answer_columns(), images, args.output)
    rows = [("adapter", str(args.adapter)), ("images", where), *report.rows(), ("loss", f"{result.loss:.4f}")]
    print(reports.table([*rows, *report.printed()]))
    with tempfile.TemporaryDirectory() as folder:
        mistakes = Path(folder) / "mistakes.png"
        picture = Path(folder) / report.picture
        report.draw(picture)
        named = report.draw_mistakes(images, mistakes, explainer)
        write_page(page, report.title(), rows, report.sections(picture), mistakes, named)
    print(reports.table([("as a page", f"{page}: mistakes too")]))
    return results


def _evaluated(deployed: Deployed) -> tuple[LabelledImages, str, Any]:
    """The labelled images of the options, how many they are and where, and the answers for them."""
    images, where = _labelled_images(deployed.args.images, deployed.about)
    if len(images) < distributed.world_size():
        raise InputError(f"{len(images)} images for {distributed.world_size()} processes: start fewer")
    return images, where, deployed.answers(images)


def threshold(args: argparse.Namespace) -> tasks.Task:
    """Choose the thresholds of several labels anew, on labelled images; write the adapter, and return its task."""
    with _deployed(args) as deployed:
        task = deployed.task
        if task.thresholds is None:
            raise InputError(f"{args.adapter} has no thresholds: only adapters with several labels have them")
        images, where, result = _evaluated(deployed)
    chosen = result.thresholds_for(args.goal)
    unknown = chosen.isnan()  # of labels of which no image can tell: they keep theirs
    task.thresholds = task.thresholds.where(unknown, chosen)
    if distributed.is_main():
        content = read_adapter_file(args.adapter)
        content["metadata"] |= {"task": task.record(), "thresholds chosen": f"for {args.goal}, in {args.images}"}
        adapter_file.write_adapter_file(content, args.output)
        report = task.report(result, images.clusters())
        kept = [("kept as it was", name) for name in itertools.compress(task.names, unknown.tolist())]
        print(reports.table([("images", where), ("thresholds for", args.goal), *report.printed(), *kept]))
        print(f"wrote {args.output}")
    return task


def compare(args: argparse.Namespace) -> list[Any]:
    """Print how much better the second of two results is than the first, or a table of more; return what is printed."""
    if len(args.results) != 2:
        rows = comparison.table_of_runs(args.results)
        print(reports.table(rows))
        return rows
    differences = comparison.compare(*args.results)
    print(reports.table(comparison.table(differences, *args.results)))
    return differences


def explain(args: argparse.Namespace) -> list[Path]:
    """Write for each image what of it decided the answer, or --label, as a picture; return the pictures' paths."""
    with _deployed(args) as deployed:
        task = deployed.task
        if args.label is None and task.per_pixel:
            raise InputError(f"explain: name the class to explain with --label: {listed(task.names)}")
        if args.label not in (None, *task.names):
            hint = did_you_mean(args.label, task.names) or f"there are {listed(task.names)}"
            raise InputError(f"--label {args.label}: no such class, label or number: {hint}")
        of = None if args.label is None else task.names.index(args.label)
        explainer = deployed.explainer()
        images = _images(args.images, deployed.about)

        def draw(i: int, place: Path) -> Path:
            *pictures, outputs = explainer.explain(images.undecoded(i)[0], of)
            if task.per_pixel:
                answer = f"{(outputs.argmax(1) == of).float().mean().item():.1%} of the pixels"
            else:
                columns, [cells] = task.table(outputs)
                answer = ", ".join(map(" ".join, zip(columns, cells, strict=True)))
            known = [Path(images.name(i)).name, args.label, answer]
            lines = textwrap.wrap(": ".join(filter(None, known)), 70, break_on_hyphens=False)
            figure = new_figure(6, 2.9 + 0.25 * len(lines))
            figure.suptitle(drawn("\n".join(lines)))
            for axes, picture in zip(figure.subplots(1, 2, subplot_kw=PICTURE_ALONE), pictures, strict=True):
                axes.imshow(picture)
            path = place.with_name(f"{place.name}.png")
            save_figure(figure, path)
            return path

        written = _write_for_each(deployed, images, [".png"], {"--label": args.label}, draw)
    print(f"wrote {args.output}: pictures of what decided, {len(written)} in all")
    return written


def demo(args: argparse.Namespace) -> None:
    """Show a page on this machine alone, on which an image is dropped and answered; or --write what a Space needs."""
    if args.write is not None:
        metadata = read_adapter_file(args.adapter)["metadata"]
        words = f"--batch-size {args.batch_size} --device {args.device} --precision {args.precision}"
        words += f" --arithmetic {args.arithmetic}"
        base, stage1 = find_base(args.adapter, metadata, args.checkpoint)
        demo_page.write_space(args.write, args.adapter, base, stage1, metadata, words.split())
        print(f"wrote {args.write}: hf upload OWNER/NAME {args.write} --repo-type space")
        return
    optional_package("gradio", "demo")  # before the model is loaded
    with _deployed(args) as deployed:
        maps = None
        if deployed.task.per_pixel:
            maps = predictions.Maps(deployed.task, deployed.windows_answered, deployed.transform, deployed.model.window)
        page = demo_page.Demo(deployed.task, deployed.explainer(), maps).page(f"What {args.adapter.name} answers")
        address = {} if "SPACE_ID" in os.environ else {"server_name": "127.0.0.1", "share": False}  # Spaces have one
        _, url, _ = page.launch(**address, quiet=True, prevent_thread_lock=True)
        print(f"drop an image on {url} in your browser; Ctrl-C stops")
        page.block_thread()


def predict(args: argparse.Namespace) -> list[Any]:
    """Write the answers for images as a table, a row for each image, and return the rows; or maps, and their paths.

    With a folder as --output it is a table in parts, of which the names are returned. A model with a class for every
    pixel writes a mask of each image there, or one map.tif; other models map.tif with an answer for each --window.
    """
    with _deployed(args) as deployed:
        task = deployed.task
        answers = f"--output {args.output}: the adapter answers for"
        if task.per_pixel and (args.output.suffix == ".csv" or args.window is not None):
            raise InputError(f"{answers} every pixel: name a folder, or map.tif for one image; drop --window")
        if task.per_pixel or args.output.suffix in MAP_SUFFIXES:
            return _predict_maps(deployed)
        if args.probabilities or args.window is not None or args.abstain is not None:
            raise InputError(f"{answers} whole images: --probabilities, --window and --abstain are for a map, map.tif")
        return _write_answers(deployed, functools.partial(predictions.write_table, task))


def _predict_maps(deployed: Deployed) -> list[Path]:
    """Write a map of each image into a folder, or of one into a file. Processes share images, or windows of the one."""
    args = deployed.args
    task = deployed.task
    images = _images_in_files(args, deployed.about)
    is_file = bool(args.output.suffix)
    if is_file and len(images) > 1:
        raise InputError(f"--output {args.output}: one map, and there are {len(images)} images; name one of them")

    def answer(windows: Tensor) -> Tensor:
        if not is_file:
            return deployed.windows_answered(windows)
        share = windows[distributed.rank() :: distributed.world_size()]
        some = share if len(share) else windows[:1]  # fewer windows than processes
        return distributed.interleave(deployed.windows_answered(some)[: len(share)])

    def write(i: int, place: Path) -> Path:
        with scenes.open_scene(images.name(i), deployed.transform.bands) as scene:
            return maps.write(scene, place, bar)

    bar = functools.partial(runs.progress_bar, title="predict", unit="row of windows", disable=not is_file)
    window = deployed.model.window if task.per_pixel else args.window or deployed.about["image_size"]
    maps = predictions.Maps(task, answer, deployed.transform, window, args.probabilities, args.abstain)
    if is_file:
        maps.writes = distributed.is_main()
        written = [write(0, args.output)]
        print(f"wrote {args.output}: 1 map of {listed(task.names)}")
    else:
        settings = {"--probabilities": args.probabilities, "--abstain": args.abstain}
        written = _write_for_each(deployed, images, predictions.MAP_ENDINGS, settings, write)
        print(f"wrote {args.output}: maps of {len(written)} images, of {listed(task.names)}")
    return written


def embed(args: argparse.Namespace) -> Any:
    """Write the features that the classifier head receives for images, float32 (N, D); return them or their parts."""
    with _deployed(args) as deployed:
        _refuse_pixels(deployed.about, "embed")
        return _write_answers(replace(deployed, model=headless(deployed.model)), _write_features)


def _write_features(features: Tensor, images: LabelledImages, path: Path) -> Tensor:
    paths = path.with_name(f"{path.stem}{commands.PATHS}")
    with files.open_atomically(path) as file:  # takes its place last: a part that has it is finished
        np.save(file, features.numpy())
        os.fsync(file.fileno())  # which takes its time: then both take their places at nearly the same moment
        files.write_cells(zip(map(images.name, range(len(images))), strict=True), ["path"], paths)
    return features


def choose(args: argparse.Namespace) -> list[str]:
    """Write which images to label next into the folder --output, and return their names, the most worth first."""
    with _deployed(args) as deployed:
        if not deployed.task.counts_images:
            raise InputError(f"{args.adapter} does not answer with one class for each image: choose by its checkpoint")
        images = _images_in_files(args, deployed.about)
        most = choosing.MOST_IMAGES
        labelled = []  # a set of each place: archives cannot be joined with others
        labels = set()
        is_known = np.zeros(len(images), bool)
        for path in args.labelled:
            some = _images([path], deployed.about)
            is_known |= among(images, some)
            labels.update(map(some.name, range(len(some))))
            labelled.append(some.at_most(most // len(args.labelled)))
        if is_known.all():
            raise InputError(f"all {len(images):,} images are labelled: name others, or train on more of these")
        images = images.subset(np.flatnonzero(~is_known))
        count = args.count or min(choosing.USUAL, len(images))
        if len(images) < count:
            raise InputError(f"--count {count}: {len(images)} images are not labelled yet; ask for fewer or name more")
        if len(images) > most:
            print(f"{len(images):,} images: {most:,} of them, drawn at random, are looked at")
        images = images.at_most(max(most, count))
        backbone = replace(deployed, model=headless(deployed.model))
        [(features, images)] = _answered(backbone, images, [range(len(images))])
        count = min(count, len(images))  # that can be read
        classes = deployed.about["class_names"]
        if not classes or 0 < len(labels) < choosing.FEW * len(classes):
            how = "the most typical first"
            known = [features[:0]]
            for some in labelled:
                [(found, _)] = _answered(backbone, some, [range(len(some))])
                known.append(found)
            chosen = choosing.most_typical(features, count, torch.cat(known))
        else:
            how = "the adapter is least sure of them"
            logits = probe.head_outputs(deployed.model, features.to(deployed.device)).cpu()
            chosen = choosing.least_sure(features, count, logits)
    images = images.subset(chosen)
    if distributed.is_main():
        choosing.write_chosen(images, args.output)
    print(f"wrote {args.output}: {count} images to label, {how}")
    return list(map(images.name, range(count)))


def _write_answers(deployed: Deployed, write: Callable[[Tensor, LabelledImages, Path], Any]) -> Any:
    """Write the answers for images into --output; return what `write` does or, of a folder, the paths of its parts."""
    args = deployed.args
    images = _images(args.images, deployed.about)
    if args.output.suffix:
        [(outputs, kept)] = _answered(deployed, images, [range(len(images))])
        answers = write(outputs, kept, args.output) if distributed.is_main() else None
        print(f"wrote {args.output}: {len(kept)} images")
        return answers
    batch_size = fixed_order_batch(args.batch_size)
    size = max(1, PART_IMAGES // batch_size) * batch_size  # no batch is in two parts, whenever a command is stopped
    parts = [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
    paths = [args.output / f"part-{number:05d}{SUFFIXES[args.command][0]}" for number in range(len(parts))]
    count = 0
    with _folder_of_answers(deployed, images, paths, [""], {"--batch-size or number of processes": size}) as finished:
        missing = {path: part for path, part in zip(paths, parts, strict=True) if not finished[path]}
        answered = _answered(deployed, images, list(missing.values()), may_be_none=True)
        for path, (outputs, kept) in zip(missing, answered, strict=True):
            count += len(kept)
            if distributed.is_main():
                write(outputs, kept, path)
    print(f"wrote {args.output}: {count} images, in {len(missing)} of {len(parts)} parts")
    return paths


def _write_for_each(deployed: Deployed, images: LabelledImages, endings: Sequence[str], settings, write) -> list[Path]:
    """Write a file for each image into --output by ``write(i, place)``, unless it is there; return the paths of all."""
    args = deployed.args
    places = predictions.places_of_images(images, args.images, args.output)
    written = []
    broken = []
    with _folder_of_answers(deployed, images, places, endings, settings) as finished:
        for i in runs.progress_bar(range(distributed.rank(), len(images), distributed.world_size()), args.command):
            try:
                written += finished[places[i]] or [write(i, places[i])]
            except folders.UnreadableImage as error:
                broken.append(error)
        written = sorted(itertools.chain(*distributed.gather(written)))  # all have ended, and the folder is released
        broken = list(itertools.chain(*distributed.gather(broken)))
        if not written:
            (args.output / predictions.MANIFEST).unlink(missing_ok=True)  # nothing is to go on
            raise InputError(broken[0].problem)
    for error in broken:
        print(f"left out: {error.problem}")
    return written


@contextlib.contextmanager
def _folder_of_answers(deployed: Deployed, images: LabelledImages, places, endings, settings) -> Iterator[dict]:
    """Hold the folder --output, and yield the files that are finished at each place: see `predictions.begin_folder`."""
    args = deployed.args
    made_of = {"command": args.command, "adapter": hashlib.sha256(args.adapter.read_bytes()).hexdigest()}
    made_of["images"] = [str(images.source.folder), images.digest]
    made_of |= {"--arithmetic": args.arithmetic, "--precision": str(deployed.dtype)}
    begin = functools.partial(predictions.begin_folder, args.output, made_of | settings, places, endings, args.resume)
    with output_folder.held(args.output):
        finished = distributed.first_does(begin)  # alone, before any of them can have written
        with output_folder.left_alone(lambda path: path.name.endswith(commands.PATHS) or not os.path.lexists(path)):
            yield finished


def _answered(deployed: Deployed, images: LabelledImages, parts: Sequence[range], may_be_none=False) -> Iterator[tuple]:
    """For each part the outputs (n, ...) and their images; those that cannot be read are listed and left out."""
    args = deployed.args
    size = deployed.about["image_size"]
    zeros = torch.zeros(input_channels(deployed.model), size, size)
    chosen = images.subset(list(itertools.chain(*parts)))
    batches = iter(runs.progress_bar(deployed.loader(TolerantImages(chosen, deployed.transform, zeros)), args.command))
    for part in parts:
        outputs = []
        problems = []
        for some, found in itertools.islice(batches, math.ceil(len(part) / fixed_order_batch(args.batch_size))):
            outputs.append(deployed.outputs(some))
            problems += found
        if not outputs:  # fewer images than processes
            outputs.append(deployed.outputs(zeros[None])[:0])
        answers = distributed.interleave(torch.cat(outputs)).cpu()  # of all processes
        shares = itertools.zip_longest(*distributed.gather(problems))
        in_order = [problem for problem in itertools.chain(*shares) if problem is not None]
        kept = sources.without_problem(in_order, may_be_none)
        yield answers[kept], images.subset(part).subset(kept)


# ----------------------------------------------------------------------------------------------- which images are meant


def _images(paths: Sequence[Path], about: dict[str, Any]) -> LabelledImages:
    """The images that are named, and all in named folders and below, and in lists; or those in a folder's archives."""
    bands = about["transform"].bands
    names = []
    for path in paths:
        if not remote.exists(path):
            raise InputError(f"{remote.address(path)}: no such file or folder; give images, lists or folders of images")
        found = [str(path)]
        if remote.is_folder(path):
            source = sources.all_images(path, bands)
            if len(paths) == 1:
                return LabelledImages(source)
            if isinstance(source, shards.ShardedImages):
                raise InputError(f"{path}: its images are in archives; name this folder alone")
            found = map(source.path, range(len(source)))
        elif path.suffix.lower() in predictions.LIST_SUFFIXES:
            images = lists.ImageList.as_in_run(path, _data_of_run(about))
            found = map(functools.partial(remote.located, images.folder), images.paths())
        names += found
    return LabelledImages(folders.ImageFiles("", dict.fromkeys(names), bands))


def _images_in_files(args: argparse.Namespace, about: dict[str, Any]) -> LabelledImages:
    images = _images(args.images, about)
    if isinstance(images.source, shards.ShardedImages):
        raise InputError(f"{args.images[0]}: its images are in archives; unpack them for this command")
    return images


def _labelled_images(place: Path, about: dict[str, Any]) -> tuple[LabelledImages, str]:
    """The labelled images that can be read, and a description of how many they are and where."""
    if not remote.exists(place):
        raise InputError(f"{remote.address(place)}: no such file or folder; give a list or a folder of labelled images")
    data = _data_of_run(about)
    by = data.get("group_by")
    task = _task_of(about)
    read = about["transform"].bands
    found = None
    if not remote.is_folder(place) or task.truth in ("labels", "numbers"):
        found = lists.ImageList.as_in_run(place, data)
    if task.per_pixel:
        images = masks.pairs_in(found or place, read, task.masks)
    else:
        if found is None:
            place = sources.part_to_evaluate(place, task.names)
        images, _ = sources.labelled(found or place, read, task.truth, task.names, "the adapter")
    if found is not None and found.group_by is not None:
        images.groups = found.groups()[images.indices]
    elif by and (found is None) == (value_at(about, "config/data/data_list") is None):
        # Levels of paths in a list are no levels of a folder. Images may lie in fewer folders than the run's.
        with contextlib.suppress(InputError):
            images.groups = splitting.folder_level(images.relative_names(), by)
    images = sources.readable(images)
    where = f"{len(images):,} in {place}"
    if images.groups is not None:
        where += f", in {len(set(images.groups)):,} groups; intervals are over groups"
    elif by:
        where += f", without groups by {printable(by)}"
    return images, where


def _data_of_run(about: dict[str, Any]) -> dict[str, Any]:
    """The data folder, --group-by and --label-columns of the run that wrote the file; not what no run can write."""
    data = value_at(about, "config/data")
    if not isinstance(data, dict):
        return {}
    known = {key: data[key] for key in ("data_dir", "group_by") if isinstance(data.get(key), str)}
    columns = data.get("label_columns")
    if isinstance(columns, list) and all(isinstance(column, str) for column in columns):
        known["label_columns"] = columns
        if _task_of(about).truth != "class":  # a list may lack the label at which a range begins
            known["label_columns"] = about["class_names"]
    return known


# ------------------------------------------------------------------------------ files that serve without this toolkit


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """Write base and adapter as one state_dict with the stock model's own keys; return the adapter's metadata."""
    model, metadata = load_finetuned(args.adapter, args.checkpoint)
    if any(files.same_file(args.output, path) for path in find_base(args.adapter, metadata, args.checkpoint)):
        raise InputError(f"--output {args.output} is what {args.adapter} was trained over; name another file")
    about = {"file": args.output.name} | usage(metadata)
    LoRAManager(model).merge_lora_weights()
    state = {name.removeprefix("backbone."): tensor for name, tensor in model.state_dict().items()}
    with files.open_atomically(args.output.with_suffix(".json")) as description:  # which no model lacks
        description.write(json.dumps(about, indent=2).encode())
        if files.is_safetensors(args.output):
            files.write_safetensors({name: tensor.contiguous() for name, tensor in state.items()}, args.output)
        else:
            files.save_atomically(state, args.output)
    arch = metadata["arch"]
    owner = f"timm's {arch.removeprefix(TIMM)}" if arch.startswith(TIMM) else f"torchvision's {arch}"
    shape = list(map("{} heads".format, other_heads(model).values()))
    shape.append(f"{len(metadata['class_names'])} classes")
    if _task_of(metadata).per_pixel:
        shape[-1] += " of every pixel"
    print(f"wrote {args.output}: a state_dict for {owner} with {' and '.join(shape)}")
    return metadata


def card(args: argparse.Namespace) -> str:
    """Write a model card of the adapter and, where it lies next to `results.json`, its figures; return it."""
    content = read_adapter_file(args.adapter)
    metadata = content["metadata"]
    adapter_file.check_metadata(args.adapter, metadata, content["tensors"])
    path = args.adapter.with_name("results.json")
    results = {}
    if path.exists() and metadata.keys().isdisjoint(("thresholds chosen", "cut to rank")):  # these have other figures
        results = comparison.read_results(path)
        if results.get("adapter_digest") != state_digest(content["tensors"]):
            raise InputError(f"{path} is of another file than {args.adapter}: move one of them")
    text = model_card.write_card(metadata, results, args.adapter.resolve().parent.name, args.adapter.name)
    files.write_text(text, args.output)
    print(f"wrote {args.output}")
    return text


def usage(metadata: dict[str, Any]) -> dict[str, Any]:
    """What a server needs to know to answer as `predict` with a merged model, explained in docs/deploy.md."""
    task = _task_of(metadata)
    size = metadata["image_size"]
    about = {key: metadata[key] for key in ("arch", "class_names", "image_size")}
    about |= {"channels": metadata.get("channels") or 3, "bands": None, "scale": 255.0}
    about |= bands.recorded(bands.from_metadata(metadata), {}) | {"activation": task.activation}
    if task.per_pixel:
        about["per_pixel"] = True
    elif size <= transforms.SEEN_WHOLE:
        about["resize"] = [size, size]
    else:
        about["resize"] = transforms.shorter_side(size)
    return about | {name: task.record()[key] for key, name in task.served.items()}


def export(args: argparse.Namespace) -> dict[str, str]:
    """Write the merged model as a graph, `.onnx` or `.pt2` (torch.export), for any number of images at a time.

    Its input is `images`, float32 (N, C, S, S), normalised as in training; with --normalise of values from 0 to 1, or
    of the files' own if these are not RGB photographs. Its output is the task's `output_name`, (N, classes), or
    (N, classes, H, W) for images (N, C, H, W), which may be larger than S where the model is a ResNet. Returns, each
    as JSON, what the file's metadata and `model.json` say is left to do around it, as `usage` does.
    """
    if args.output.suffix == ".onnx":
        optional_package("onnxscript", f"--output {args.output}", "onnx onnxscript")
    model, metadata = load_finetuned(args.adapter, args.checkpoint)
    model = LoRAManager(model).unload(merge=True).requires_grad_(False)
    channels = input_channels(model)
    task = _task_of(metadata)
    any_size = task.per_pixel and isinstance(model.backbone, ResNet)
    about = {"file": args.output.name} | usage(metadata)
    if args.normalise:
        scale = 1.0
        if about["bands"] is not None:
            scale = about["scale"]
            about["scale"] = 1.0
        normalise = nn.BatchNorm2d(channels, eps=0.0, affine=False)
        normalise.running_mean = scale * torch.tensor(about["mean"])
        normalise.running_var = (scale * torch.tensor(about["std"])).square()
        model = nn.Sequential(normalise, model)
        about |= {"mean": [0.0] * channels, "std": [1.0] * channels}
    about["outputs"] = task.output_name
    output_layer = task.output_layer()
    if not isinstance(output_layer, nn.Identity):
        about["activation"] = "none"
        about.pop("output_mean", None)
        about.pop("output_std", None)
    notes = {key: json.dumps(value) for key, value in about.items()}
    program = _graph(nn.Sequential(model, output_layer).eval(), metadata["image_size"], channels, any_size)
    with files.open_atomically(args.output) as file, warnings.catch_warnings():
        if args.output.suffix == ".onnx":
            warnings.simplefilter("ignore")  # the exporter warns of its own future changes
            titles = {"input_names": ["images"], "output_names": [task.output_name]}
            graph = torch.onnx.export(program, dynamo=True, verbose=False, **titles)
            graph.model.metadata_props.update(notes)
            file.write(graph.model_proto.SerializeToString())
        else:
            content = io.BytesIO()  # on a full disk torch's own writer would end the process
            torch.export.save(program, content, extra_files=notes)
            file.write(content.getvalue())
        files.write_text(json.dumps(about, indent=2), args.output.with_suffix(".json"))  # no graph lacks it
    what = f"{metadata['arch']} for images of {metadata['image_size']} pixels"
    print(f"wrote {args.output}: {what}; its metadata: {', '.join(notes)}")
    return notes


def _graph(model: nn.Module, image_size: int, channels: int, any_size: bool) -> torch.export.ExportedProgram:
    dynamic = {0: torch.export.Dim("batch")}
    if any_size:
        dynamic |= {axis: torch.export.Dim(name, min=SMALLEST) for axis, name in ((2, "height"), (3, "width"))}
    images = torch.zeros(2, channels, image_size, image_size)
    fast_path = torch.backends.mha  # one operation for all of attention, which ONNX does not know
    with contextlib.ExitStack() as stack:
        stack.callback(fast_path.set_fastpath_enabled, fast_path.get_fastpath_enabled())
        fast_path.set_fastpath_enabled(False)
        return torch.export.export(model, (images,), dynamic_shapes=(dynamic,))


def _cut_to_rank(args: argparse.Namespace) -> None:
    """Write an adapter file --output with the main part of each layer's change, and with all else as it is."""
    layers = read_adapter_file(args.adapter)["layers"]
    if any(map(recorded_in_4_bits, layers.values())):
        raise InputError(f"{args.adapter} was trained over 4-bit weights; --rank is for adapters over float ones")
    trained, metadata = load_finetuned(args.adapter, args.checkpoint)
    if is_none(metadata["checkpoint"]):
        raise InputError(f"{args.adapter} began at random weights, so there is no checkpoint to put adapters on")
    base = find_base(args.adapter, metadata, args.checkpoint)
    model, _ = load_base(*base, **model_shape(metadata), per_pixel=_task_of(metadata).per_pixel)
    highest = max((record["r"] for record in layers.values()), default=full_rank(model))
    if args.rank >= highest:
        raise InputError(f"--rank {args.rank}: {args.adapter} has rank {highest}; give a lower one")
    state = LoRAManager(trained).unload(merge=True).state_dict()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    adapted = {}
    for name, layer in adaptable_layers(model).items():
        weights = [dotted(name, own) for own, parameter in layer.named_parameters() if parameter.dim() > 1]
        if not in_head(model, name) and not changed.isdisjoint(weights):
            adapted[name] = LoRASettings(args.rank, 2 * args.rank)
            changed.difference_update(weights)
    adapt_layers(model, adapted)
    energies = initialization.start_at_change(model, state)
    model.load_state_dict({name: state[name] for name in changed}, strict=False)
    if not energies:
        raise InputError(f"{args.adapter}: only its head has trained, so there is no change to cut to a rank")
    kept, total = map(sum, zip(*energies.values(), strict=True))
    worst, (part, whole) = min(energies.items(), key=lambda item: item[1][0] / item[1][1])
    metadata = adapter_file.unmeasured(metadata) | {"lora": {"r": args.rank, "lora_alpha": 2 * args.rank}}
    del metadata["transform"]
    metadata["cut to rank"] = f"{args.rank}, {kept / total:.1%} of the change's energy kept"
    accuracy = "compare both by evaluate, or by convert --images"
    if args.images is not None:
        accuracy = _compare_on_images(args, model, changed)
    LoRAManager(model).save_lora_checkpoint(args.output, metadata)
    of_layers = f"{len(energies)} layers keep {kept / total:.1%} of the energy of their change"
    print(f"wrote {args.output}: {of_layers}, {worst} the least, {part / whole:.1%}; {accuracy}")


def _compare_on_images(args: argparse.Namespace, cut: nn.Module, changed: set[str]) -> str:
    """Say what both models score on --images. Changed BatchNorm statistics become those of the images, if better."""
    for name, module in cut.named_modules():
        freeze_statistics(module, dotted(name, "running_var") not in changed, training=False)
    norms = nn.ModuleList(evaluation.training_norms(cut))
    with _deployed(args) as before:
        images, where, result = _evaluated(before)
        LoRAManager(cut).merge_lora_weights()
        after = replace(before, model=devices.place(cut, before.device))
        scores = [result.score, after.answers(images).score]
        told = "{} before, {} after"
        if len(norms):
            stored = copy.deepcopy(norms.state_dict())
            some = images.at_most(loaders.STATISTICS_IMAGES)
            if min(len(some), args.batch_size) == 1:
                raise InputError("--images: one image has no variance; give more of them, or a larger --batch-size")
            batches = after.loader(Transformed(some, after.transform), drop_last=len(some) > args.batch_size)
            evaluation.estimate_statistics(cut, batches, after.device, after.dtype)
            scores.append(after.answers(images).score)
            told += " with the file's BatchNorm statistics, {} with these images': the better ones are written"
            if scores[2] > scores[1]:  # the count stays: another in a file says that the norm has trained
                stored = {name: count for name, count in stored.items() if name.endswith("num_batches_tracked")}
            norms.load_state_dict(stored, strict=False)
    return f"{before.task.score_title} on {where}: {told.format(*map(before.task.reported, scores))}"


def convert(args: argparse.Namespace) -> None:
    """Write an adapter file of a lower --rank, or a folder for `peft.PeftModel.from_pretrained(base, folder)`."""
    if args.rank is not None:
        _cut_to_rank(args)
        return
    peft = peft_format.import_peft()
    model, metadata = load_finetuned(args.adapter, args.checkpoint)
    _refuse_pixels(metadata, "convert")
    obstacles = list(peft_format.obstacles(model, read_adapter_file(args.adapter)["tensors"]))
    if obstacles:
        raise InputError(f"{args.adapter} cannot be written for PEFT: {listed(obstacles)}; use merge or export")
    base, _ = load_base(*find_base(args.adapter, metadata, args.checkpoint), **model_shape(metadata))
    tolerance = ROUNDING
    if any(is_adapted(module) and module.base_bits == 4 for module in model.modules()):
        tolerance = torch.inf
        print("the adapter was trained over 4-bit weights; PEFT puts it on float ones, which are not quite the same")
    if metadata.get("stage1_adapter"):
        print("in PEFT it belongs on what finetune_lora.load_base(checkpoint, stage1_adapter, num_classes) returns")
    with tempfile.TemporaryDirectory() as scratch:
        peft_format.write_peft(model, Path(scratch))
        theirs = peft.PeftModel.from_pretrained(base, scratch).eval()
        shape = 2, input_channels(model), metadata["image_size"], metadata["image_size"]
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(images)
            error = ((theirs(images) - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
        if not error <= tolerance:
            raise InputError(f"the installed PEFT's logits with this adapter differ by {error:.1e} of their size")
        with contextlib.ExitStack() as both:  # or none takes its place
            for name in (peft_format.CONFIG, peft_format.WEIGHTS):
                both.enter_context(files.open_atomically(args.output / name)).write(Path(scratch, name).read_bytes())
    print(f"wrote {args.output}; on random images PEFT's logits and these differ by {error:.1e} of their size")


def main(argv: Sequence[str] | None = None) -> Any:
    """Run a function above. Raises InputError with all problems of the options, or for files that do not fit."""
    args = read_options(argv, __doc__)
    if args.command not in ON_IMAGES and not distributed.is_main():
        return None  # several processes share images alone
    writes = distributed.is_main() and "output" in args and commands.files_written(args)
    try:
        with commands.writing(args) if writes else contextlib.nullcontext():
            return globals()[args.command](args)
    except InputError as error:
        raise InputError(error.problem) from None  # the advice is for training


if __name__ == "__main__":
    runs.run_script(main)
