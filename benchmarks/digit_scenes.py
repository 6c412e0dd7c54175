"""Write images with masks that need no download: handwritten digits on a noisy ground, and the class of every pixel.

    python -m benchmarks.digit_scenes scenes            # scenes/{train,val}/{images,masks}: 100 and 50 scenes
    python finetune_lora.py --task segmentation --data-dir scenes --checkpoint shipped --output-dir checkpoints/scenes

The digits are scikit-learn's. Class 0 is the ground, class 1 + n the ink of the digit n. Evaluation scenes have digits
that no training scene has.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 96  # pixels of a scene
DIGITS = 6  # in a scene
INK = 0.45  # the darkness from which on a pixel is the digit's
SCENES = {"train": 100, "val": 50}


def scene(pixels: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(image, mask), (SIDE, SIDE) of uint8 both: digits at random places, which do not touch, on noise."""
    image = random.uniform(0, 0.35, (SIDE, SIDE))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cells = random.choice(9, DIGITS, replace=False)  # of a grid of three by three
    for cell, chosen in zip(cells, random.choice(len(labels), DIGITS, replace=False), strict=True):
        side = int(random.integers(22, 31))
        digit = Image.fromarray((pixels[chosen] * 255).astype(np.uint8)).resize((side, side), Image.BILINEAR)
        levels = np.asarray(digit) / 255
        top, left = 32 * np.array(divmod(cell, 3)) + random.integers(0, 32 - side + 1, 2)
        part = np.s_[top : top + side, left : left + side]
        image[part] = np.maximum(image[part], levels)
        mask[part][levels > INK] = 1 + labels[chosen]
    return (image * 255).astype(np.uint8), mask


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"{args.folder} is there, maybe with images of yours: name another folder")
    digits = load_digits()
    cut = len(digits.target) * 2 // 3
    parts = {"train": slice(None, cut), "val": slice(cut, None)}
    random = np.random.default_rng(args.seed)
    for part, which in parts.items():
        for kind in ("images", "masks"):
            (args.folder / part / kind).mkdir(parents=True)
        for number in range(SCENES[part]):
            image, mask = scene(digits.images[which] / 16, digits.target[which], random)
            Image.fromarray(image).save(args.folder / part / "images" / f"{number:03d}.png")
            Image.fromarray(mask).save(args.folder / part / "masks" / f"{number:03d}.png")


if __name__ == "__main__":
    main()
