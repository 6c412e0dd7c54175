"""Draw docs/photographs.png: fine-tune on pieces of two photographs, and show the answers for other pieces of them.

    python docs/draw_photographs.py
    python docs/draw_photographs.py --checkpoint lite0.pth --arch timm:tf_efficientnet_lite0   # the same, from a file

The photographs are scikit-learn's `china.jpg` (by danielbuechele) and `flower.jpg` (by vultilion), CC BY 2.0.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune_lora import load_finetuned, main
from toolkit.answers.heat_maps import Explainer
from toolkit.answers.report_page import PICTURE_ALONE, new_figure

# Where pieces of each class are cut out, to train on and to evaluate: left, upper, right and lower edge in pixels.
PLACES = {
    "flower": ("flower.jpg", (190, 100, 305, 340), (315, 100, 430, 340)),
    "leaf": ("flower.jpg", (0, 0, 160, 400), (470, 60, 640, 360)),
    "sky": ("china.jpg", (330, 0, 480, 180), (490, 0, 640, 130)),
    "temple": ("china.jpg", (100, 100, 210, 340), (215, 100, 325, 340)),
    "tree": ("china.jpg", (385, 330, 550, 427), (560, 150, 640, 420)),
}
SIDE = 64  # pixels of a piece
PIECES = {"train": 12, "val": 8}  # of each class
SHOWN = ("temple", "tree", "flower", "leaf", "sky")
PICTURE = Path(__file__).with_name("photographs.png")


def cut_out(folder: Path) -> None:
    """Write train/CLASS/NUMBER.png and val/CLASS/NUMBER.png."""
    random = np.random.RandomState(0)
    for name, (photograph, *places) in PLACES.items():
        image = Image.fromarray(load_sample_image(photograph))
        for (part, count), (left, upper, right, lower) in zip(PIECES.items(), places, strict=True):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                x = random.randint(left, right - SIDE + 1)
                y = random.randint(upper, lower - SIDE + 1)
                piece = image.crop((x, y, x + SIDE, y + SIDE)).resize((96, 96), Image.Resampling.BICUBIC)
                piece.save(folder / part / name / f"{number}.png")


def draw(adapter: Path, folder: Path) -> None:
    """A column for each class: a piece, its answer, and what spoke for it."""
    model, info = load_finetuned(adapter)
    explainer = Explainer(model, info["transform"], torch.device("cpu"), torch.float32, info["mean"], info["std"])
    figure = new_figure(6.6, 2.9)
    axes = figure.subplots(2, len(SHOWN), subplot_kw=PICTURE_ALONE)
    for (above, below), name in zip(axes.T, SHOWN, strict=True):
        with Image.open(folder / "val" / name / "0.png") as image:
            seen, heat, outputs = explainer.explain(image)
        probability, answer = outputs.softmax(1).max(1)
        above.imshow(seen)
        above.set_title(f"{info['class_names'][answer]} {probability.item():.0%}", fontsize=11)
        below.imshow(heat)
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    with Image.open(content) as picture:
        picture.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        cut_out(Path(folder))
        options = ["--checkpoint", "timm:tf_efficientnet_lite0.in1k", *sys.argv[1:], "--data-dir", folder]
        options += ["--output-dir", f"{folder}/run", "--image-size", "96", "--batch-size", "8", "--epochs", "5"]
        results = main(options)
        draw(Path(folder, "run/lora.pth"), Path(folder))
        print(f"{PICTURE}: {results['val_accuracy']:.1%} of {results['val_images']} pieces right")
