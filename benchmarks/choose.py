"""Measure what it is worth to choose which images to label, and whether wrong labels are found.

    python -m benchmarks.choose --data-dir photos --checkpoint timm:tf_efficientnet_lite0.in1k \\
        --image-size 96 --output clothes.json
    python -m benchmarks.choose --output digits.json                    # shipped backbone, embedded digits
    python -m benchmarks.choose ... --pool 900 --labels 10 30 50 75 100 --draws 5

Each draw takes --pool training images, whatever their classes. Of these, --labels get their labels: at random; as many
of each class, which nobody can do who has no labels; or as `deploy_lora.py choose` says, in one round for each number
of labels. A linear probe on these labels is judged on the evaluation images. Then all of the pool gets labels, of which
a tenth is made wrong: how well does the list `labels_to_check.csv` find these?
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.compare_peers import current_commit
from finetune_lora import load_base
from toolkit import InputError, homed, is_free, note_written, unnoted
from toolkit.answers import choosing, evaluation
from toolkit.answers.probe import Probe, fit_linear_probe
from toolkit.config import positive_int
from toolkit.files import write_text
from toolkit.images.data import LabelledImages, Transformed, build_loader
from toolkit.images.sources import load_splits
from toolkit.images.transforms import eval_transform, train_transform
from toolkit.models.backbones import normalization
from toolkit.run.runs import run_script

WRONG = 10  # one in so many labels is made wrong, and so many of the list are looked at
CPU = torch.device("cpu")


class Pool(NamedTuple):
    """Features (N, D) of images and of an augmented view of each, and labels (N,)."""

    plain: Tensor
    view: Tensor
    labels: Tensor

    def some(self, positions: Sequence[int]) -> "Pool":
        positions = torch.as_tensor(np.array(positions, int))
        return Pool(*(part[positions] for part in self))

    def probe(self, classes: int) -> Probe:
        return fit_linear_probe(torch.cat([self.plain, self.view]), self.labels.repeat(2), classes, views=2)


def answers(probe: Probe, features: Tensor) -> Tensor:
    return features @ probe.weight.T + probe.bias


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parser().parse_args(argv)
    if args.output is not None and not is_free(args.output, __name__):
        problem = f"--output {args.output} is there, not known to be as this wrote it: move it, or name another"
        raise InputError(f"{problem}{unnoted()}")
    images, held_out, classes = read_features(args)
    ways = {"random": at_random, "balanced": balanced, "chosen": in_rounds}
    accuracies: dict[str, dict[int, list[float]]] = {way: {number: [] for number in args.labels} for way in ways}
    found = []
    for draw in range(args.draws):
        order = np.random.default_rng(draw).permutation(len(images.labels))[: args.pool]
        pool = images.some(order)
        for way, choose in ways.items():
            for number, chosen in zip(args.labels, choose(pool, args.labels, classes), strict=True):
                probe = pool.some(chosen).probe(classes)
                right = answers(probe, held_out.plain).argmax(1) == held_out.labels
                accuracies[way][number].append(right.float().mean().item())
        found.append(find_wrong_labels(pool, classes, draw))
    command = shlex.join(["python", "-m", "benchmarks.choose", *(sys.argv[1:] if argv is None else argv)])
    result = {
        "command": command,
        "commit": current_commit(),
        "pool": len(order),
        "held_out": len(held_out.labels),
        "accuracies": accuracies,
        "labels_needed": {way: labels_needed(accuracies[way], accuracies["random"]) for way in ways},
        "wrong_labels": {name: [row[name] for row in found] for name in found[0]},
    }
    if args.output is not None:
        write_text(json.dumps(result, indent=2), args.output)
        note_written([args.output], __name__)
    print(table(result))
    return result


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=homed)
    parser.add_argument("--checkpoint", type=homed, default="checkpoints/moco_stage1/moco_stage1_epoch_100.pth")
    parser.add_argument("--arch")
    parser.add_argument("--image-size", type=positive_int)
    parser.add_argument("--augmentation", default="crop")
    parser.add_argument("--most", type=positive_int, default=4_000, help="images that are read of each part")
    parser.add_argument("--pool", type=positive_int, default=900)
    parser.add_argument("--labels", type=positive_int, nargs="+", default=[10, 30, 50, 75, 100])
    parser.add_argument("--draws", type=positive_int, default=5)
    parser.add_argument("--output", type=homed)
    return parser


def read_features(args: argparse.Namespace) -> tuple[Pool, Pool, int]:
    """The features of the training and of the evaluation images, and the number of classes."""
    splits = load_splits("digits" if args.data_dir is None else "imagefolder", args.data_dir)
    classes = len(splits.class_names)
    model, report = load_base(args.checkpoint, None, classes, arch=args.arch, image_size=args.image_size)
    values = normalization(report["arch"])
    plain = eval_transform(report["image_size"], **values)
    augmented = train_transform(report["image_size"], args.augmentation, **values)

    def features(images: LabelledImages, transform: Callable) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        loader = build_loader(Transformed(images, transform), 64)
        return evaluation.extract_features(model.eval(), loader, CPU, torch.float32)

    train = splits.train.at_most(args.most)
    found, labels = features(train, plain)
    held_out, held_out_labels = features(splits.val.at_most(args.most), plain)
    view, _ = features(train, augmented)
    return Pool(found, view, labels), Pool(held_out, held_out, held_out_labels), classes


# ---------------------------------------------------- which images get labels: positions in the pool, by their number


def at_random(pool: Pool, numbers: Sequence[int], classes: int) -> list[Sequence[int]]:
    return [range(number) for number in numbers]  # the pool is in random order


def balanced(pool: Pool, numbers: Sequence[int], classes: int) -> list[Sequence[int]]:
    """As many of each class, as far as the pool has them."""
    of_class = [np.flatnonzero(pool.labels == label) for label in range(classes)]
    return [np.concatenate([places[: number // classes] for places in of_class]) for number in numbers]


def in_rounds(pool: Pool, numbers: Sequence[int], classes: int) -> list[Sequence[int]]:
    """As `deploy_lora.py choose` does with what the rounds before have labelled."""
    chosen: list[int] = []
    found = []
    for number in numbers:
        rest = np.setdiff1d(np.arange(len(pool.labels)), chosen)
        features = pool.plain[rest]
        count = number - len(chosen)
        if len(chosen) < choosing.FEW * classes:
            more = choosing.most_typical(features, count, pool.plain[chosen])
        else:
            probe = pool.some(chosen).probe(classes)
            more = choosing.least_sure(features, count, answers(probe, features))
        chosen = [*chosen, *rest[more].tolist()]
        found.append(chosen)
    return found


def labels_needed(accuracies: dict[int, list[float]], of_random: dict[int, list[float]]) -> float | None:
    """How many labels a way needs for the mean accuracy of the most labels at random; between numbers, on a line."""
    numbers = list(accuracies)
    means = [statistics.mean(accuracies[number]) for number in numbers]
    goal = statistics.mean(of_random[numbers[-1]])
    if means[-1] < goal:
        return None
    place = next(i for i, mean in enumerate(means) if mean >= goal)
    if place == 0:
        return float(numbers[0])
    share = (goal - means[place - 1]) / (means[place] - means[place - 1])
    return numbers[place - 1] + share * (numbers[place] - numbers[place - 1])


# -------------------------------------------------------------------------------------------------------- wrong labels


def find_wrong_labels(pool: Pool, classes: int, seed: int) -> dict[str, float]:
    """Make a tenth of the labels wrong, and look for them: the AUROC of the list, and shares of it that are wrong."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    number = len(pool.labels) // WRONG
    wrong = np.zeros(len(pool.labels), bool)
    wrong[rng.permutation(len(wrong))[:number]] = True
    labels = pool.labels.clone()
    labels[wrong] = (labels[wrong] + torch.from_numpy(rng.integers(1, classes, number))) % classes
    probe = pool._replace(labels=labels).probe(classes)
    listed = [image for image, *_ in choosing.contradicted(probe.held_out, labels)]
    ranks = np.zeros(len(wrong))
    ranks[listed] = np.arange(len(listed), 0, -1)
    return {
        "auroc": float(roc_auc_score(wrong, ranks)),
        "listed": len(listed) / len(wrong),
        "wrong_listed": float(wrong[listed].sum() / number),
        "wrong_in_first_tenth": float(wrong[listed[:number]].mean()),
    }


def table(result: dict[str, Any]) -> str:
    """The table of RESULTS.md: points over as many labels at random, with the standard error of paired differences."""
    accuracies = result["accuracies"]
    lines = []
    for way, by_number in accuracies.items():
        cells = []
        for number, found in by_number.items():
            base = accuracies["random"][number]
            differences = [100 * (one - other) for one, other in zip(found, base, strict=True)]
            cell = f"{100 * statistics.mean(found):.1f}"
            if way != "random" and len(differences) > 1:
                error = statistics.stdev(differences) / len(differences) ** 0.5
                cell += f" ({statistics.mean(differences):+.1f} ± {error:.1f})"
            cells.append(cell)
        needed = result["labels_needed"][way]
        cells.append("more" if needed is None else f"{needed:.0f}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    numbers = " | ".join(map(str, accuracies["random"]))
    lines.insert(0, f"| labels | {numbers} | needed for random's last |\n{'|---' * (len(accuracies['random']) + 2)}|")
    wrong = {name: f"{statistics.mean(found):.2f}" for name, found in result["wrong_labels"].items()}
    return "\n".join([*lines, f"wrong labels: {wrong}"])


if __name__ == "__main__":
    run_script(main)
