"""What a run prints while it trains, and what it leaves: result files, pictures and the table printed at its end."""

import contextlib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit import VERSION, InputError, config, devices, files, listed, printable, typed
from toolkit.answers import answer_reports, comparison, heat_maps, measures, tasks
from toolkit.answers.report_page import BLUE, ORANGE, html_pictures, new_figure, save_figure, write_page
from toolkit.images import bands, remote, shards, sources, transforms
from toolkit.models import backbones, checkpoints, published
from toolkit.run import options, teacher, verdict
from toolkit.run.training import best_epoch, column

FineTuned = Any  # a run: `finetune_lora.FineTuning`, which no file below that one can name
BASELINES = {"knn": "k-NN", "probe": "linear probe"}  # what is measured before training


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def short_rate(rate: float) -> str:
    """A learning rate as people type it: 1e-4, 2.4e-3."""
    digits, _, power = f"{rate:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def describe_data(args: options.DataOptions, splits: sources.Splits) -> str:
    """One line: how many images train, how many are evaluated on, and where these come from."""
    where = " (a part of the training images: --eval-split validation)" if args.eval_split == "validation" else ""
    if args.folds is not None:
        where = f" (part {args.folds.replace('/', ' of ')}: --folds)"
    numbers = f"{len(splits.train):,} training images, {len(splits.val):,} evaluation images{where}"
    groups = ""
    if args.group_by is not None:
        counts = splits.counts()
        groups = f", in {counts['train_groups']:,} + {counts['val_groups']:,} groups ({printable(args.group_by)})"
    one, several = tasks.TASKS[args.task].outputs_are
    outputs = len(splits.class_names)
    return f"data: {numbers}, {outputs} {one if outputs == 1 else several}{groups}"


def describe_start(run: FineTuned) -> str:
    """A line on how good the backbone is before training, and what else is to be known of the start."""
    task = run.task
    scores = run.baseline.items()
    measured = [f"{BASELINES[name]} {task.reported(score)}" for name, score in scores if score is not None]
    lines = f"before training: {', '.join(measured) or 'nothing to compare with'}"
    if not task.counts_images:
        lines += f" ({task.score_title})"
    elif run.baseline["probe"] == 1:
        images = len(run.splits.val)
        lines += f"\nthe linear probe gets all {images} evaluation images right: no training can do better on them"
    return lines if run.by_unlabelled is None else f"{lines}\n{describe_unlabelled(run)}"


def describe_unlabelled(run: FineTuned) -> str:
    """Two lines: where the head starts by the images without labels, and what they are taken for."""
    found = run.by_unlabelled
    line = "unlabelled: the head starts at the probe: no other is better for labelled images held out"
    if run.task.contradicted is None:
        line = "unlabelled: the head starts at the probe: with one label of a class none is held out to judge others by"
    elif found["name"] != "probe":
        gained = f"log loss {-found['gain_loss']:+.3f}, accuracy {100 * found['gain_accuracy']:+.1f} points"
        line = f"unlabelled: the head starts at {found['name']}, for labelled images held out better: {gained}"
    if run.teacher is None:
        why = "of which the start knows too little"
        if not teacher.enough_labels(run.splits):
            why = f"below {teacher.LEAST_LABELS} labels a class"
        elif found["left_out"] == found["images"]:
            why = "all of which are of another kind than the labelled ones"
        line += f"; images without labels, {why}, do not train"
    answers = listed([f"{printable(name)} {share:.0%}" for name, share in found["shares"].items()], 12)
    line += f"\n  they are taken for {answers}; {found['foreign']:.0%} resemble no labelled image"
    if run.teacher is not None and found["left_out"]:
        line += " and do not train"
    return line


def describe_rates(run: FineTuned) -> str:
    """One line: the learning rates of head, adapters and whatever else trains, and whether they are those asked for."""
    reported = [f"head {short_rate(run.rate)}"]
    if run.adapter_rate is not None:
        why = f" ({run.adapter_lr_factor:.3g}x: they start at the gradient)" if run.adapter_lr_factor > 1 else ""
        reported.append(f"adapters {short_rate(run.adapter_rate)}{why}")
    if not run.args.freeze_backbone:
        reported.append(f"backbone {short_rate(run.rate)}")
    elif run.plan.norms == "train":
        reported.append(f"norms {short_rate(run.rate)}")
    asked = run.args.learning_rate
    if run.rate < asked:
        remedy = "--head-init random" if run.adapter_rate is None else "--lora-init random"
        why = f"so few steps cannot correct what a high rate does (with {remedy} it stays as typed)"
        if run.guard.retreats:
            why = "lowered where training collapsed or gained nothing"
        reported[-1] += f"; {100 * run.rate / asked:.3g}% of {short_rate(asked)}: {why}"
    return f"learning rate: {', '.join(reported)}"


def describe_epoch(run: FineTuned) -> str:
    """A line on the last finished epoch: losses, score, and the time that is left. A second one if it is not saved."""
    row = run.history[-1]
    losses = f"training loss {row['train_loss']:.3f}, evaluation {row['val_loss']:.3f}"
    score = f"{run.task.score_title} {run.task.reported(row[f'val_{run.task.score}'])}"
    lines = f"epoch {row['epoch']}: {losses}, {score}; {describe_times(run.history, run.args.epochs)}"
    if run.kept.at_start:
        start = _name_of_start(run)
        lines += f"\n  the {start} still answers training images better than this epoch does: it is saved and evaluated"
    return lines


def _name_of_start(run: FineTuned) -> str:
    return "start" if run.by_unlabelled or run.baseline["probe"] is None else "linear probe"


def describe_times(history: Sequence[dict[str, Any]], epochs: int) -> str:
    """How long the last finished epoch took, and what is left of the whole run."""
    left = sum(column(history, "seconds")) / len(history) * (epochs - history[-1]["epoch"])
    taken = duration(history[-1]["seconds"])
    return f"{taken}, {duration(left)} left" if left else taken


def adapter_metadata(run: FineTuned) -> dict[str, Any]:
    """What `load_finetuned` needs of the file that a run saves, and what a reader of it would ask."""
    stage1 = run.args.stage1_adapter
    score = f"val_{run.task.score}"
    task = run.task.record()
    return {
        **{name: run.report[name] for name in ("arch", "image_size", "heads")},
        "class_names": run.identity["class_names"],
        "version": VERSION,
        **bands.recorded(run.plan.normalization, run.report),
        "checkpoint": checkpoints.stored_checkpoint(run.args.checkpoint),
        "stage1_adapter": None if stage1 is None else str(files.stored_path(stage1.absolute())),
        "lora": options.lora_options(run.args),
        "epoch": len(run.history),
        "keeps_start": run.kept.at_start,
        score: run.history[-1][score] if run.history else run.baseline["probe"],
        "config": run.identity["config"],
        **({} if task is None else {"task": task}),
    }


def write_finetuning(run: FineTuned, result: tasks.Answers, kept: dict, counts: dict[str, int]) -> dict[str, Any]:
    """Write and print the results of the model that was saved, and return the content of `results.json`."""
    report = run.task.report(result, run.splits.val.clusters())
    results = _results(run, result, report.figures(), kept, counts)
    comparison.write_answers(report.answer_columns(), run.splits.val, run.path("results.json"))
    curves = run.path("training_curves.png")
    plot_finetuning(run, curves)
    report.draw(run.path(report.picture))
    explainer = None  # for other tasks: there the answer that is wrong need not be the highest output
    if run.task.counts_images and backbones.block_names(run.model):
        normalization = run.plan.normalization
        view = transforms.eval_transform(run.report["image_size"], **normalization)
        explainer = heat_maps.Explainer(run.model, view, run.device, run.dtype, **normalization)
    mistakes = run.path("mistakes.png")
    named = report.draw_mistakes(run.splits.val, mistakes, explainer)
    images = run.task.counts(run.splits.train)
    places = _places(run)
    found = verdict.judge(results, run.history, run.task, sum(images.values()) / len(images), places)
    results["verdict"] = found._asdict()
    meaning = [("what was gained", found.gained), *(("limited by", limit) for limit in found.limits)]
    meaning.append(("next", found.next_step))
    predict = verdict.predict_command(run.task, places["adapter"])
    if predict != found.next_step:
        meaning.append(("or use it", predict))
    if run.args.stage1_adapter is not None:
        gained = gained_by_stage_1(run.path("results.json"), results["config"])
        meaning.append(("gained by stage 1", gained))
        results["verdict"]["gained_by_stage_1"] = gained
    rows = list(summary(run, results, report))
    number = f"{results['train_images']:,} to train, {results['val_images']:,} to evaluate"
    backbone = results["backbone"]
    about = [backbone["arch"], f"from {backbone['name']}", backbone["source"]]
    about.append(f"licence: {backbone['licence'] or 'see its publisher'}")
    shown = [*meaning, *rows, ("images", number), ("backbone", ", ".join(filter(None, about)))]
    shown += [describe_rates(run).split(": ", 1), *_made()]
    sections = [*report.sections(run.path(report.picture)), *labels_to_check(run)]
    write_page(run.path("report.html"), report.title(), shown, sections, mistakes, named, curves, results["config"])
    files.write_text(json.dumps(results, indent=2), run.path("results.json"))  # the last file: a complete run has it
    by_label = report.printed() if report.in_summary else []
    print(f"\n{table([*rows, *by_label, *meaning])}")
    return results


def _places(run: FineTuned) -> dict[str, str]:
    """What the next commands are given, as they take it: the adapter, what has labels, and images without, if known."""
    train, val, _, others = run.splits
    labelled = run.args.data_list or ()
    unlabelled = list(filter(None, [run.args.unlabelled]))
    if train.in_files and not labelled:
        labelled = dict.fromkeys((train.source.folder, val.source.folder))
        beside = Path(train.source.folder).absolute().with_name("unlabelled")
        if not unlabelled and beside.is_dir():
            unlabelled = [beside]
    if others is not None and isinstance(others.source, shards.ShardedImages):
        unlabelled = []  # `choose` reads no archives
    found = {"adapter": [run.path("lora.pth")], "labelled": labelled, "unlabelled": unlabelled}
    return {name: shlex.join(map(remote.address, paths)) for name, paths in found.items()}


def _results(run: FineTuned, result: tasks.Answers, figures: dict, kept: dict, counts: dict) -> dict[str, Any]:
    """The content of `results.json`, but for the verdict."""
    score = f"val_{run.task.score}"
    best = {"epoch": 0, score: run.baseline["probe"]}  # where no epoch did well
    if run.history:
        best = best_epoch(run.history, run.task.best_by.get(run.args.keep_best, score))
    adapter = run.path("lora.pth")
    return {
        "task": run.task.kind,
        score: figures.pop(run.task.score),
        "val_loss": result.loss,
        "val_images": len(result.targets),
        f"{score}_interval": figures.pop(f"{run.task.score}_interval"),
        "eval_split": run.args.eval_split,
        "kept_epoch": kept["epoch"],  # of which `lora.pth` and these accuracies are
        # It was chosen on the images that it is measured on, so it is no number to publish.
        "best_epoch": best["epoch"],
        f"best_{score}": answer_reports.finite(best[score]),
        f"knn_{run.task.score}_before": answer_reports.finite(run.baseline["knn"]),
        f"probe_{run.task.score}_before": answer_reports.finite(run.baseline["probe"]),
        **figures,
        **run.splits.counts(),
        "class_names": run.task.names,
        "backbone": {"arch": run.report["arch"], **published.described(run.args.checkpoint, run.report["licence"])},
        "learning_rate": run.args.learning_rate,
        "head_learning_rate": run.rate,
        "adapter_learning_rate": run.adapter_rate,
        "chosen_by": _chosen_by(run),
        "unlabelled": run.by_unlabelled,  # what such images did; None where there were none
        "keeps_start": kept["keeps_start"],  # training did harm
        "retreats": run.guard.retreats,
        "epochs": len(run.history),
        "seconds": sum(column(run.history, "seconds")) + run.guard.lost_seconds,
        **run.meter.results(),
        "trainable_parameters": counts["trainable"],
        "total_parameters": counts["total"],
        "lora_parameters": counts["lora"],
        "peak_memory_bytes": devices.peak_memory_bytes(run.device),
        "adapter_bytes": adapter.stat().st_size,
        "adapter_digest": checkpoints.state_digest(files.read_checkpoint(adapter)["tensors"]),
        "backbone_bytes": 4 * (counts["total"] - counts["lora"]),
        "device": str(run.device),
        "precision": str(run.dtype).removeprefix("torch."),
        "arithmetic": run.args.arithmetic,
        "version": VERSION,
        "images": run.identity["images"],
        "normalization": bands.recorded(run.plan.normalization, run.report),
        "config": run.identity["config"],
    }


def gained_by_stage_1(mine: Path, settings: Mapping[str, Any]) -> str:
    """Compare a run with one in a folder beside it that lacks stage 1, or say how. `mine`: its results.json to be."""
    own = config.flat(settings)
    for path in sorted(mine.absolute().parent.parent.glob("*/results.json")):
        with contextlib.suppress(InputError):
            if config.flat(comparison.read_results(path).get("config", {})) == own | {"model.stage1_adapter": None}:
                _, _, (measure, found), *_ = comparison.table(comparison.compare(path, mine), path, mine)
                return f"{measure} {found}, against {path.parent}"
    return f"{typed('deploy')} compare RUN_WITHOUT_IT/results.json {shlex.quote(str(mine))}"


def labels_to_check(run: FineTuned) -> list[str]:
    """Write the training images whose label the probe contradicts, the worst first, and show some, for the page."""
    found = run.task.contradicted
    if found is None:
        return []
    images = run.splits.train.at_most(run.splits.train.most_probed)  # cached features have no pictures
    names = run.task.names
    rows = []
    shown = []
    for i, answer, times in found:
        label = names[images.labels[i]]
        rows.append((images.name(i), label, names[answer], f"{times:.3g}"))
        shown.append((i, f"{label}, and not {names[answer]}?"))
    if not run.path("labels_to_check.csv").exists():  # a resumed run's may be half worked through
        files.write_cells(rows, ("path", "label", "answer", "times"), run.path("labels_to_check.csv"))
    explained = f"<p>A linear probe takes {len(found):,} of {len(images):,} training images that it has not seen for "
    explained += "another class, and is surest of these; labels_to_check.csv has them all.</p>"
    return ["<h2>Labels to look at</h2>", explained, html_pictures(images, shown[: answer_reports.PICTURES])]


def _made() -> Iterator[tuple[str, str]]:
    """When and by what a page was made: version and command, unless Python called the script."""
    yield "made", f"{time.strftime('%Y-%m-%d %H:%M')} by version {VERSION}"
    if Path(sys.argv[0]).name.startswith(("finetune_lora.py", "moco-lora-finetune")):
        yield "command", f"{typed('finetune')} {shlex.join(sys.argv[1:])}"


def _chosen_by(run: FineTuned) -> dict[str, str]:
    """Which images chose what was not typed; nothing else was chosen by images that do not train."""
    chosen = {}
    if run.plan.rate_searched or run.path("learning_rates.csv").exists():
        chosen["learning rate"] = "trials on a part of the training images"
    chooses = run.task.best_by.get(run.args.keep_best)
    if chooses is not None and not all(map(math.isnan, column(run.history, chooses))):
        chosen["epoch"] = "the evaluation images"
    return chosen


def table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def plot_finetuning(run: FineTuned, path: Path) -> None:
    """Losses and score by epoch, both losses without label smoothing."""
    task = run.task
    history = run.history
    figure = new_figure(9, 3.6)
    losses, scores = figure.subplots(1, 2)
    epochs = column(history, "epoch")
    losses.plot(epochs, column(history, "train_loss"), "o-", color=BLUE, label="training")
    losses.plot(epochs, column(history, "val_loss"), "s--", color=ORANGE, label="evaluation")
    losses.set(ylabel=task.loss_title, title="Loss")
    factor, unit = task.axis
    scores.plot(epochs, [factor * row[f"val_{task.score}"] for row in history], "s--", color=ORANGE, label="evaluation")
    for name, style in (("knn", ":"), ("probe", "-.")):
        if run.baseline[name] is not None:
            label = f"{BASELINES[name]} before training"
            scores.axhline(factor * run.baseline[name], color="0.4", linestyle=style, label=label)
    scores.set(ylabel=f"{task.score_title}{unit}", title=task.score_title[0].upper() + task.score_title[1:])
    for axes in (losses, scores):
        _by_epoch(axes)
        axes.legend()
    save_figure(figure, path)


def _by_epoch(axes: Any) -> None:
    axes.set(xlabel="epoch")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # one epoch: one tick
    axes.grid(alpha=0.3)


def plot_pretraining(history: list[dict[str, Any]], path: Path) -> None:
    """A panel each, by epoch: the contrastive loss, and the measures of the features."""
    titles = {"loss": "contrastive loss", **measures.TITLES}
    panels = []
    for name in titles:
        if rows := [row for row in history if row[name] is not None]:
            panels.append((name, rows))
    figure = new_figure(3.6 * len(panels), 3.2)
    for axes, (name, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        style = {"color": BLUE, "marker": "."} if name == "loss" else {"color": ORANGE, "marker": "o"}
        axes.plot(column(rows, "epoch"), column(rows, name), **style)
        axes.set(title=titles[name])
        axes.yaxis.set_major_formatter({"knn_accuracy": "{x:.1%}"}.get(name, axes.yaxis.get_major_formatter()))
        _by_epoch(axes)
    save_figure(figure, path)


def summary(run: FineTuned, results: dict[str, Any], report: answer_reports.Report) -> Iterator[tuple[str, str]]:
    """The table printed at the end of a fine-tuning run: (name, value) of each row."""
    task = run.task
    (title, headline), *others = report.rows()
    before = {f"k-NN {task.score_title} before": run.baseline["knn"], "linear probe before": run.baseline["probe"]}
    for name, score in before.items():
        if score is not None:
            yield name, task.reported(score)
    yield f"{title} after", headline
    if "val_groups" in results:
        groups = f"{results['val_images']:,} images in {results['val_groups']:,} groups"
        yield "", f"{groups} ({run.args.group_by}); intervals are over groups"
    for what, images in results["chosen_by"].items():
        of_epoch = f"{results['kept_epoch']} of {results['epochs']}"
        value = of_epoch if what == "epoch" else short_rate(results["learning_rate"])
        yield "", f"{what} {value} chosen by {images}"
    if run.args.keep_best and "epoch" not in results["chosen_by"]:
        yield "", "the last epoch is kept: what --keep-best chooses by is not defined on the evaluation images"
    yield from others
    trained = results["trainable_parameters"]
    total = results["total_parameters"]
    yield "trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"
    if results["keeps_start"]:
        yield "saved weights", f"those of the {_name_of_start(run)}, which answers training images better"
    memory = "not known on this system"
    if results["peak_memory_bytes"]:
        whole = "" if results["device"].startswith("cuda") else ", the whole process"  # with Python and PyTorch
        memory = f"{results['peak_memory_bytes'] / 1e6:,.0f} MB ({results['device']}{whole})"
    yield "adapter file", f"{results['adapter_bytes'] / 1e6:.2f} MB (backbone {results['backbone_bytes'] / 1e6:.1f} MB)"
    yield "training time", duration(results["seconds"])
    yield "peak memory", memory
    yield "results in", f"{run.args.output_dir}/: lora.pth, last.pth, metrics.csv, results.json, config.yaml,"
    if task.contradicted is not None:
        yield "", f"labels_to_check.csv ({len(task.contradicted):,} training images that the probe answers otherwise),"
    yield "", f"training_curves.png, {report.picture}, mistakes.png; report.html shows them all"
