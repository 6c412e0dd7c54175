"""Images with masks, a class for every pixel: finding and checking the pairs, and one draw of a crop for both."""

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from toolkit import NO_LABEL, InputError, printable
from toolkit.images import data, families, folders, lists, remote, splitting, transforms
from toolkit.images.bands import Bands, array_of, levels_of_tiff, open_image

MOST_CLASSES = 255

# -------------------------------------------------------------------------------------------- classes and their colours


class Classes(NamedTuple):
    names: Sequence[str]
    values: Sequence[int] | None = None  # of each in the files of masks, where these are not 0, 1, 2, ...
    colours: Sequence[Sequence[int]] | None = None  # of each in RGB masks, 0 to 255
    unknown: Sequence[Any] = ()  # the values, or colours, of pixels that do not count


_TITLES = {"name", "class", "label", "value", "id", "r", "g", "b", "red", "green", "blue", "color", "colour"}
_LINE = re.compile(r"(.+?)((?:[\s,;]+\d{1,9}){3}|[\s,;]+-?\d{1,9})?")
_VALUES = range(-(2**15), 2**16)


def read_classes(given: Sequence[str] | None) -> Classes | None:
    """The classes of --classes: names, or the path of a text or CSV file with a line for each class.

    A line is `name`, `name value` or `name r g b`; pixels of a value or colour that is called `unknown` do not count.
    Raises InputError for a file that is none of this, fewer than two classes, or two with one name, value or colour.
    """
    if not given:
        return None
    where = f"--classes {printable(' '.join(given))}"
    place = os.path.expanduser(given[0])  # behind a = no shell has done that
    if len(given) == 1 and remote.is_file(place):
        lines = _lines_of(place, where)
    else:
        lines = [(name, ()) for name in families.split_names(given)]
    names = []
    marks = []
    unknown = []
    for name, mark in lines:
        if mark and name.lower() == "unknown":
            unknown.append(mark)
        else:
            names.append(name)
            marks.append(mark)
    if not 2 <= len(names) <= MOST_CLASSES:
        raise InputError(f"{where}: {len(names)} classes; give 2 to {MOST_CLASSES} names, or a file that exists")
    kinds = set(map(len, marks + unknown))
    if len(kinds) > 1:
        raise InputError(f"{where}: a value for each class, a colour for each, or neither; here they are mixed")
    for what, values in (("name", names), ("value or colour", filter(None, marks + unknown))):
        [(value, count)] = Counter(values).most_common(1) or [("", 1)]
        if count > 1:
            raise InputError(f"{where}: {count} lines have the {what} {printable(value)}; each class has its own")
    if kinds == {3}:
        return Classes(tuple(names), colours=tuple(marks), unknown=tuple(unknown))
    return Classes(tuple(names), values=sum(marks, ()) or None, unknown=sum(unknown, ()))


def _lines_of(path: str, where: str) -> list[tuple[str, tuple[int, ...]]]:
    """The name in each line of a file, and behind it the value (v,), the colour (r, g, b), or nothing, ()."""
    try:
        text = remote.read(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: cannot read it as text: {printable(error)}") from None
    lines = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if not lines and set(re.split(r"[\s,;]+", line.lower())) <= _TITLES:
            continue
        name, behind = _LINE.fullmatch(line).groups("")
        mark = tuple(map(int, re.findall(r"-?\d+", behind)))
        allowed = range(256) if len(mark) == 3 else _VALUES
        if "," in name or not set(mark).issubset(allowed):
            raise InputError(f"{where}: '{printable(line)}' is not `name`, `name value` or `name r g b` (0 to 255)")
        lines.append((folders.one_spelling(name.strip('"')), mark))
    return lines


# Okabe and Ito's colours, which colour-blind readers tell apart: jfly.uni-koeln.de/color
_OKABE_ITO = ("000000", "e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")


def palette(count: int, colours: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    """The colours of `count` classes, (count, 3) from 0 to 1: those given, or fixed ones for each number."""
    if colours is not None:
        return np.array(colours, dtype=float) / 255
    first = np.array(list(map(tuple, map(bytes.fromhex, _OKABE_ITO)))) / 255
    # Then a sequence that fills the cube of colours evenly: of 256 no two are closer than 0.07, and none is grey.
    others = (0.55 + np.arange(len(first), count)[:, None] * [0.8191725, 0.6710436, 0.5497005]) % 1
    return np.concatenate([first, others])[:count]


def coloured(classes: Tensor, palette: np.ndarray) -> np.ndarray:
    """The class numbers (H, W) as a picture (H, W, 3) from 0 to 1; NO_LABEL is grey."""
    colours = np.concatenate([palette, np.full((1, 3), 0.6)])
    numbers = classes.long()  # 8 bits would take class 156 for NO_LABEL
    return colours[numbers.where(numbers != NO_LABEL, -1).numpy()]


# -------------------------------------------------------------------------------------------------------- reading masks

_FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # of masks: no format that changes numbers, by compression or by its range
_MISSING = -1  # the class of a value or colour that no class has
_BEYOND = (_VALUES.start - 1, _VALUES.stop)  # stand for all values below and above


class MaskReader:
    """Reads the file of a mask as class numbers, (H, W) int16. Raises InputError for a file that is no such mask.

    Without classes a pixel's class is its value. What is `unknown` does not count; None: 255, unless it is a class's.
    Where the classes have colours, a mask is read as a picture in them, and `unknown` has no meaning.
    """

    def __init__(self, classes: Classes | None, unknown: Sequence[float] | None = None):
        self.names = classes and classes.names
        classes = classes or Classes(tuple(map(str, range(MOST_CLASSES))))
        self.colours = classes.colours
        if unknown is None:
            unknown = [] if 255 in (classes.values or ()) else [255]
        for name, value in zip(classes.names, classes.values or (), strict=False):
            if value in unknown:
                raise InputError(f"{printable(name)} has the value {value}, which counts as unknown")
        if self.colours is not None:
            size = 2**24
            marks = self.colours
            not_counted = classes.unknown
            self.remedy = ""  # where the masks seem to be read otherwise than they are meant
        else:
            size = _BEYOND[1] - _BEYOND[0] + 1
            marks = classes.values or range(len(classes.names))
            not_counted = [*classes.unknown, *(value for value in unknown if value % 1 == 0)]  # masks have no others
            self.remedy = "; if 255 is a class, give --classes a file with the lines `background 0` and `NAME 255`"
        self.classes = np.full(size, _MISSING, np.int16)  # of each code
        self.classes[self._codes(np.array(marks, float))] = np.arange(len(marks))
        for mark in not_counted:
            self.classes[self._codes(np.array(mark, float))] = NO_LABEL
        # For an adapter file: see `from_record`.
        self.record = {"unknown": list(unknown), "values": classes.values, "colours": classes.colours}
        self.record["unknown_marks"] = classes.unknown

    @staticmethod
    def from_record(record: Mapping[str, Any], names: Sequence[str]) -> "MaskReader":
        """What read the masks that an adapter was trained on, from its file."""
        classes = Classes(names, record.get("values"), record.get("colours"), record.get("unknown_marks") or ())
        return MaskReader(classes, list(record.get("unknown", [255])))

    def _codes(self, marks: np.ndarray) -> np.ndarray:
        """Values (...) or colours (..., 3) as places in the table of classes."""
        if self.colours is None:
            return np.clip(marks, *_BEYOND).astype(np.int64) - _BEYOND[0]
        return marks.astype(np.int64) @ np.array([2**16, 2**8, 1])

    def __call__(self, path: str) -> np.ndarray:
        with folders.named_faults(path):
            marks = _decoded(path, self.colours is not None)
        if self.colours is None and marks.ndim == 3:
            raise InputError(f"{path}: an RGB mask", "; give --classes a file with a line `name r g b` for each class")
        if self.colours is not None and marks.ndim == 2:
            raise InputError(f"{path}: a mask of numbers, where the classes have colours; save it as RGB")
        found = self.classes[self._codes(marks)]
        missing = marks[found == _MISSING]
        if len(missing):
            kind = "value"
            mark = " ".join(map("{:.0f}".format, np.ravel(missing[0])))
            remedy = f"--unknown-value {mark}"
            if self.colours is not None:
                kind = "colour"
                remedy = f"a line `unknown {mark}` there"
            advice = f"; add a line `NAME {mark}` to the file of --classes, or {remedy} if such pixels do not count"
            raise InputError(f"{path}: a pixel has the {kind} {mark}, which is no class's", advice)
        return found


def _decoded(path: str, in_colours: bool) -> np.ndarray:
    """The numbers (H, W) in the file of a mask, or colours (H, W, 3): as far as they are asked for, or there alone."""
    ending = os.path.splitext(path)[1].lower()
    if ending == ".npy":
        levels = array_of(remote.read(path))
    elif ending in (".tif", ".tiff"):
        levels, _ = levels_of_tiff(remote.read(path))
    else:
        with open_image(path) as image:
            if image.format not in _FORMATS:
                changes = f"the format {image.format} may change the values of a mask"
                raise InputError(f"{path}: {changes}; save it anew, from where it was made, as PNG, TIFF or .npy")
            few_bits = re.search("L;([24])", str(image.tile))
            if in_colours and image.mode in ("1", "L", "P"):
                image = image.convert("RGB")
            levels = np.asarray(image)
        if few_bits and not in_colours:  # numbers that Pillow has spread over 0 to 255, as if each had a grey
            levels = levels // (255 // (2 ** int(few_bits[1]) - 1))
    if levels.ndim == 3 and levels.shape[2] in (3, 4) and levels.dtype == np.uint8:
        return levels[..., :3]
    if levels.ndim == 3 and 1 in (levels.shape[0], levels.shape[2]):
        levels = levels[..., 0] if levels.shape[2] == 1 else levels[0]
    if levels.ndim != 2 or not levels.size or levels.dtype.kind not in "buif":
        raise ValueError(f"it has {levels.dtype} {levels.shape}, and a mask has whole numbers (H, W)")
    if levels.dtype.kind != "f":
        return levels.astype(np.int64)
    if not np.array_equal(levels, np.round(levels)):
        raise ValueError("it has numbers with decimals, or NaN")
    return levels


# ---------------------------------------------------------------------------------------------------- images with masks


class PairFiles(folders.ImageFiles):
    """The files of images, and of the mask of each: `pairs` of paths relative to `folder` and to `mask_folder`."""

    def __init__(self, folder: Path, mask_folder: Path, pairs: Sequence[tuple[str, str]], bands, read: MaskReader):
        names, self.masks = zip(*pairs, strict=True)
        super().__init__(folder, names, bands)
        self.mask_folder = str(mask_folder)
        self.read = read
        self.largest = 0  # pixels of any image, as far as they were counted

    def mask_path(self, i: int) -> str:
        return remote.located(self.mask_folder, self.masks[i])

    def pixels(self, i: int) -> np.ndarray | InputError:
        """How many pixels of a mask are unknown, and of each class; or what is wrong with the pair."""
        path = self.mask_path(i)
        try:
            mask = self.read(path)
            with folders.named_faults(self.path(i)):
                image = self[i]
                if isinstance(image, np.ndarray):
                    height, width = image.shape[:2]
                else:
                    # Of a PNG `getexif` would decode all, in case its EXIF data stand at the end.
                    if (image.format != "PNG" or "exif" in image.info) and transforms.orientation(image) != 1:
                        image = transforms.to_rgb(image)
                    width, height = image.size
        except InputError as error:
            return error
        if mask.shape != (height, width):
            sizes = f"the mask is {mask.shape[1]}x{mask.shape[0]}, and its image (upright) {width}x{height}"
            return InputError(f"{path}: {sizes}; save it at that size, each pixel with the nearest one's class")
        pixels = np.bincount(mask.ravel().clip(-1) + 1)
        if len(pixels) == 1:
            return InputError(f"{path}: all pixels are unknown", f"; remove it{self.read.remedy}")
        return pixels


class MaskedImages(data.LabelledImages):
    """(image as `LabelledImages` has it, mask (H, W) int64) of `PairFiles`. `targets` (N, K) count pixels by class."""

    of_any_size = True
    most_probed = 500  # of which the probe is of some pixels of each: `segmentation.PROBE_ROWS`

    @staticmethod
    def views(image_size: int, augmentation: str, **normalization: Any) -> tuple[Callable, ...]:
        """The same; for evaluation, whole images, and else `PairCrop`, which varies for the augmentation 'crop'."""
        whole = transforms.eval_transform(None, **normalization)
        crop = PairCrop(image_size, augmentation == "crop", whole)
        return crop, crop, crop, whole

    @staticmethod
    def collate(batch: Sequence[tuple[Tensor, Tensor]]) -> tuple[Any, Any]:
        """A batch of images and one of masks; as two lists where their sizes differ."""
        images, masks = zip(*batch, strict=True)
        if len({mask.shape for mask in masks}) > 1:
            return list(images), list(masks)
        return torch.stack(images), torch.stack(masks)

    def undecoded(self, i: int) -> tuple[Image.Image | np.ndarray, Tensor]:
        return super().undecoded(i)[0], self.mask(i)

    def mask(self, i: int) -> Tensor:
        return torch.from_numpy(self.source.read(self.source.mask_path(self.indices[i])).astype(np.int64))

    def picture(self, i: int, step: int) -> np.ndarray:
        """The image as a picture (H, W, 3) from 0 to 1, of every `step`-th pixel."""
        image = np.asarray(self[i][0])[::step, ::step]
        if self.bands is None:
            return image / 255
        return self.bands.picture(torch.from_numpy(image).permute(2, 0, 1))


Place = lists.ImageList | tuple[Path, Path]  # where pairs are: in a list, or in folders of the images and of the masks


def pairs_in(place: str | Path | lists.ImageList, bands: Bands | None, read: MaskReader) -> MaskedImages:
    """The pairs in a folder, of one in parts those to evaluate on, or in a list. Says which pairs it leaves out."""
    if not isinstance(place, lists.ImageList):
        place = pair_places(place, None, needs_val=True)[-1]
    [images], _ = load_pairs([place], 1, bands, read, skip_unreadable=True, trains=False)
    return images


def load_pairs(
    places: Sequence[Place], count: int, bands: Bands | None, read: MaskReader, skip_unreadable: bool, trains=True
) -> tuple[list[MaskedImages], list[str]]:
    """The images with masks of each place, of those behind the first `count` none, and the names of the classes.

    Raises InputError if there are no pairs, if one cannot be used, or if masks that train are all of one class.
    """
    parts = [_pairs(place, bands, read, skip_unreadable) for place in places[:count]]
    found = []
    problems = []
    for files in parts:
        looked_at = data.look_at_each(files.pixels, len(files), "mask")
        wrong = [pixels for pixels in looked_at if isinstance(pixels, InputError)]
        if len(wrong) == len(looked_at):
            raise InputError(f"none of the pairs can be used, such as {wrong[0].problem}", *wrong[0].args[1:])
        problems += wrong
        found.append({i: pixels for i, pixels in enumerate(looked_at) if not isinstance(pixels, InputError)})
        files.largest = max(map(np.sum, found[-1].values()))
    _leave_out(problems, skip_unreadable)
    classes = max(len(pixels) for part in found for pixels in part.values()) - 1
    names = list(read.names or map("class {}".format, range(classes)))
    images = []
    for files, usable in zip(parts, found, strict=True):
        targets = torch.zeros(len(files), len(names))
        for i, pixels in usable.items():
            targets[i, : len(pixels) - 1] = torch.from_numpy(pixels[1:])
        masked = MaskedImages(files, splitting.strata((targets > 0).float()).tolist(), targets=targets)
        images.append(masked.subset(list(usable)))
    seen = torch.cat([part.targets for part in images]).sum(0).nonzero().flatten().tolist()
    if trains and len(seen) == 1:
        where = f"{parts[0].mask_folder}: all known pixels are of one class"
        raise InputError(f"{where}, {printable(names[seen[0]])}{read.remedy}")
    if len(images) < len(places):
        images.append(images[0].subset([]))
    return images, names


def _leave_out(problems: Sequence[InputError], skip_unreadable: bool) -> None:
    if problems and not skip_unreadable:
        raise InputError(*problems[0].args, f" (--skip-unreadable leaves out such pairs, {len(problems)} here)")
    if problems:
        print(f"{len(problems)} pairs of image and mask cannot be used and are left out:")
    for error in problems:
        print(f"  {error.problem}")


_MASK_ENDS = ("_mask", "_label", "_labels", "_seg", "_gt")
_LAYOUTS = "expected images/ and masks/ (or in train/ and val/ each; or images/train and masks/train), or files as "
_LAYOUTS += "x.jpg and x_mask.png; else name them in a list, a line `image,mask` each"


def pair_folders(folder: Path) -> tuple[Path, Path]:
    """Where the images and the masks of a folder are: in two folders within it, or both in itself."""
    for images, masks in itertools.product(("images", "image"), ("masks", "mask", "labels", "annotations")):
        if remote.is_folder(folder / images) and remote.is_folder(folder / masks):
            return folder / images, folder / masks
    return folder, folder


def pair_places(data_dir: str | Path | None, val_dir: str | Path | None, needs_val: bool) -> list[Place | None]:
    """The folders of pairs to train on, and of a divided set those to evaluate on; None if these are not needed."""
    if data_dir is None or not remote.is_folder(data_dir):
        raise InputError(f"--data-dir {data_dir}: no such folder; {_LAYOUTS}")
    images, masks = pair_folders(Path(data_dir))

    def part(name: str) -> tuple[Path, Path]:
        if images == masks:
            return pair_folders(images / name)
        return images / name, masks / name

    training = [name for name in ("train", "training") if remote.is_folder(images / name)]
    trained = part(training[0]) if training else (images, masks)
    if not training and val_dir is None:
        return [trained]
    if not needs_val:
        return [trained, None]
    if val_dir is not None:
        return [trained, pair_folders(Path(val_dir))]
    return [trained, part(folders.evaluation_folder(images).name)]


def _pairs(place: Place, bands: Bands | None, read: MaskReader, skip_unreadable: bool) -> PairFiles:
    """The files of a place. Raises InputError for an image or a mask without the other."""
    if isinstance(place, lists.ImageList):
        return PairFiles(place.folder, place.folder, place.pairs(), bands, read)
    folder, mask_folder = place
    others: Counter = Counter()
    names = folders.image_names(folder, others=others, bands=bands)
    masks = folders.image_names(mask_folder, bands=Bands(1))  # masks may be .npy where images are photographs
    if folder == mask_folder:
        masks = [name for name in masks if folders.without_suffix(name).endswith(_MASK_ENDS)]
        names = sorted(set(names) - set(masks))
    else:
        folders.report_others(folder, others)
    mask_of = _by_stem(mask_folder, masks)
    pairs = []
    problems = []
    for stem, name in _by_stem(folder, names).items():
        for end, mask_end in itertools.product(("", "_image", "_img"), ("", *_MASK_ENDS)):
            mask = stem.removesuffix(end) + mask_end
            if stem.endswith(end) and mask in mask_of:
                pairs.append((name, mask_of.pop(mask)))
                break
        else:
            missing = f"{folder / name}: there is no mask {stem}.png or {stem}_mask.png in {mask_folder}; add it"
            problems.append(InputError(missing))
    if not pairs:
        raise InputError(f"{folder}: no pairs of images and masks; {_LAYOUTS}")
    for name in mask_of.values():
        problems.append(InputError(f"{mask_folder / name}: there is no image of its name in {folder}; remove it"))
    _leave_out(problems, skip_unreadable)
    return PairFiles(folder, mask_folder, pairs, bands, read)


def _by_stem(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The names by what they are without the suffix of an image. Raises InputError for two that differ in it alone."""
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(folders.without_suffix(name), name)
        if other != name:
            raise InputError(f"{folder / name}: {printable(other)} has the same name; remove one of them")
    return found


# ----------------------------------------------------------------------------------------------------------- transforms

LARGEST_ZOOM = 2.0  # of crops; the smallest is its inverse


@dataclass
class PairCrop:
    """For training: (image, mask (H, W)) -> ((C, S, S), normalised; (S, S)), one draw of a square for both.

    The square is S pixels wide, or with `varied` S / zoom, and then it is flipped every second time. Where it is larger
    than the image, the image's border is repeated, and the mask is NO_LABEL.
    """

    takes_label = True  # see `Transformed`
    size: int
    varied: bool
    whole: transforms.View

    def __call__(self, image: Image.Image | np.ndarray, mask: Tensor) -> tuple[Tensor, Tensor]:
        zoom = 1.0
        flipped = False
        if self.varied:
            zoom = LARGEST_ZOOM ** (2 * torch.rand(()).item() - 1)
            flipped = torch.rand(()).item() < 0.5
        side = max(1, round(self.size / zoom))
        top, left = (_drawn(length, side) for length in mask.shape)
        if (mask[max(0, top) : top + side, max(0, left) : left + side] == NO_LABEL).all():  # few pixels are known
            known = (mask != NO_LABEL).nonzero()
            top, left = map(_drawn, mask.shape, (side, side), known[torch.randint(len(known), ())].tolist())
        box = max(left, 0), max(top, 0), min(left + side, mask.shape[1]), min(top + side, mask.shape[0])
        inside = slice(box[1], box[3]), slice(box[0], box[2])
        image = self.whole(image[inside] if isinstance(image, np.ndarray) else image.crop(box))
        mask = mask[inside]
        outside = (box[0] - left, left + side - box[2], box[1] - top, top + side - box[3])
        image = F.pad(image[None], outside, mode="replicate")
        mask = F.pad(mask, outside, value=NO_LABEL)
        if side != self.size:
            image = F.interpolate(image, size=(self.size, self.size), mode="bilinear", antialias=True)
            nearest = ((torch.arange(self.size) + 0.5) * side / self.size).long()
            mask = mask[nearest][:, nearest]
        if flipped:
            return image[0].flip(-1), mask.flip(-1)
        return image[0], mask


def _drawn(length: int, side: int, pixel: int | None = None) -> int:
    """Where a random window begins along a side of an image: within it, or around it if it is larger; over a pixel."""
    low, high = sorted((0, length - side))
    if pixel is not None:
        low, high = max(low, pixel - side + 1), min(high, pixel)
    return torch.randint(low, high + 1, ()).item()
