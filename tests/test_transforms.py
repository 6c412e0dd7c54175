"""toolkit/images/transforms.py: any image becomes RGB; views are torchvision's, from fewer pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from benchmarks import loading
from tests.image_files import oriented, save_image
from toolkit import InputError, choices
from toolkit.images import data, folders, transforms
from toolkit.images.bands import open_image


def test_every_image_mode_becomes_rgb():
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    transparent = palette.copy()
    transparent.info["transparency"] = 1
    for image, expected in (
        (Image.new("L", (3, 1), 90), (90, 90, 90)),
        (Image.new("1", (1, 3), 1), (255, 255, 255)),
        (palette, (10, 20, 30)),
        (transparent, (255, 255, 255)),
        (Image.fromarray(np.full((3, 2), 257 * 90, dtype=np.uint16)), (90, 90, 90)),
        (Image.fromarray(np.full((3, 2), 250, dtype=np.uint16)), (1, 1, 1)),
        (Image.new("I", (1, 1), 257 * 90), (90, 90, 90)),
        (Image.new("I", (1, 1), 90), (90, 90, 90)),
        (Image.fromarray(np.float32([[0.5, np.nan], [np.inf, -np.inf]])), (128, 128, 128)),  # and three black
        (Image.new("CMYK", (1, 1), (0, 0, 0, 255)), (0, 0, 0)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 51)), (206, 208, 210)),  # a fifth, over white
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
    ):
        rgb = transforms.to_rgb(image)
        assert (rgb.mode, rgb.size, rgb.getpixel((0, 0))) == ("RGB", image.size, expected)


def test_near_infrared_marked_as_transparency_is_left_out_and_numbers_without_a_white_are_refused(tmp_path):
    """GDAL marks the fourth band of 8 bits so; over white, vegetation would be pale."""
    levels = np.random.RandomState(0).randint(0, 256, (16, 16, 4)).astype(np.uint8)
    for name in ("rgbn.tif", "rgbn.jp2"):
        image = open_image(save_image(tmp_path / name, Image.fromarray(levels)))
        assert image.mode == "RGBA" and np.array_equal(transforms.to_rgb(image), levels[..., :3])
    # By its own largest number one image of a set would be a hundred times as dark as the next.
    pytest.importorskip("tifffile")
    for levels in (np.float32([0, 1.02]), np.float32([-0.5, 0.5]), np.int32([0, 300]), np.int16([-9, 9])):
        with pytest.raises(InputError, match=r"a.tif: its numbers go from .* --scale and --bands 1,1,1"):
            transforms.to_rgb(open_image(save_image(tmp_path / "a.tif", levels[None])))


def test_a_transform_takes_what_image_open_returns_and_shows_it_upright(tmp_path):
    """As `load_finetuned` gives it to those who predict: the same bits as in evaluation. Each file is odd, such that
    Image.open alone does not give its pixels as evaluation sees them."""
    levels = np.random.RandomState(0).randint(0, 256, (40, 30, 4)).astype(np.uint8)
    rgb = Image.fromarray(levels[..., :3])
    exif = oriented(6)
    for name, image, options in (
        ("plain.png", rgb, {}),
        ("rotated.jpg", rgb, {"exif": exif}),
        ("rotated.png", rgb.transpose(Image.Transpose.ROTATE_180), {"exif": oriented(8)}),
        ("rotated.tif", rgb, {"exif": exif}),
        ("rgba.png", Image.fromarray(levels), {}),
        ("palette.png", rgb.quantize(16), {}),
        ("transparent palette.png", rgb.quantize(16), {"transparency": 3}),
        ("16 bits.png", Image.fromarray(levels[..., 0].astype(np.uint16) * 257), {}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
    ):
        save_image(tmp_path / name, image, **options)
    seen = {path.name: transforms.to_rgb(Image.open(path)) for path in tmp_path.iterdir()}
    upright = rgb.transpose(Image.Transpose.ROTATE_270)
    for name in ("rotated.png", "rotated.tif"):
        assert np.array_equal(seen[name], upright), name
    for image in seen.values():
        assert transforms.to_rgb(image) is image  # nothing is done twice
    photograph(tmp_path / "large.jpg")
    images = data.LabelledImages(folders.ImageFiles(tmp_path, [*seen, "large.jpg"]))
    for transform in (transforms.eval_transform(32), transforms.eval_transform(96)):
        for i, (evaluated, _) in enumerate(data.Transformed(images, transform)):
            assert torch.equal(transform(Image.open(images.name(i))), evaluated), images.name(i)
    some = images.subset([[*seen].index("rotated.jpg"), [*seen].index("rgba.png")])
    modes = [(image.mode, image.size) for image, _ in data.Transformed(some, lambda image: image)]
    assert modes == [("RGB", (40, 30)), ("RGB", (30, 40))]


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("source", [(1, 1), (8, 8), (200, 30)])
def test_every_transform_takes_images_of_any_size(size, source):
    found = [transforms.eval_transform(size)]
    found += [transforms.train_transform(size, name) for name in choices.AUGMENTATIONS]
    for name in choices.TWO_CROPS:
        found += transforms.two_crops(size, name).views
    for transform in found:
        tensor = transform(Image.new("RGB", source, (120, 130, 140)))
        assert tensor.shape == (3, size, size) and tensor.dtype == torch.float32 and tensor.isfinite().all()


def views_of(name: str, size: int) -> list[transforms.View]:
    if name == "eval":
        return [transforms.eval_transform(size)]
    return [transforms.train_transform(size)] if name == "crop" else list(transforms.two_crops(size, name).views)


@pytest.mark.parametrize("name", ["eval", "crop", "moco_v2", "moco_v3"])
@pytest.mark.parametrize(("size", "source"), [(32, (50, 41)), (96, (300, 170)), (96, (60, 200))])
def test_a_view_is_what_torchvision_makes_of_the_image(name, size, source):
    """As the benchmark has torchvision's transforms, from the same draws, bit for bit."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (*source[::-1], 3)).astype(np.uint8))
    stock = loading.reference_transform({"eval": "evaluation", "crop": "fine-tuning"}.get(name, name), size)
    stock_views = stock.views if isinstance(stock, loading.Twice) else [stock]
    for ours, theirs in zip(views_of(name, size), stock_views, strict=True):
        for seed in range(4):
            views = []
            for transform in (ours, theirs):
                torch.manual_seed(seed)
                views.append(transform(image))
            torch.testing.assert_close(*views, rtol=0, atol=0)


def test_the_blur_of_photographs_is_a_gaussian_of_up_to_two_pixels():
    """Pillow's is made of boxes: on noise its levels are off by two of 256 on average at the most."""
    pixels = np.random.RandomState(0).randint(0, 256, (40, 30, 3)).astype(np.uint8)
    for seed in range(5):
        torch.manual_seed(seed)
        found = np.asarray(transforms.blurred(Image.fromarray(pixels)))
        torch.manual_seed(seed)
        std = torch.empty(1).uniform_(0.1, 2.0).item()
        expected = gaussian_filter(pixels.astype(float), (std, std, 0), mode="nearest")
        assert np.abs(found - expected).mean() < 2


def test_bands_vary_in_brightness_each_by_itself_and_noise_leaves_grey_grey():
    bands = transforms.band_brightness(0.4, torch.ones(600, 2, 3))
    assert torch.equal(bands, bands[:, :1, :1].expand(600, 2, 3))
    assert 0.6 <= bands.min() < 0.62 and 1.38 < bands.max() <= 1.4
    noise = transforms.grey_noise(0.05, torch.ones(3, 40, 40)) - 1
    assert torch.equal(noise, noise[:1].expand(3, 40, 40)) and noise.std().item() == pytest.approx(0.05, rel=0.1)


def photograph(path, size=(1210, 900), **options) -> None:
    y, x = np.mgrid[: size[1], : size[0]] / 60
    levels = np.stack([np.sin(x) * np.cos(y), np.sin(x + y), np.sign(np.sin(x * y / 9))], axis=2)
    save_image(path, (127.5 + 100 * levels).astype(np.uint8), quality=95, **options)


@pytest.mark.parametrize(
    ("name", "levels", "format", "orientation"),
    [("eval", 1.0, "MPO", 1), ("eval", 1.0, "JPEG", 3), ("crop", 2.5, "JPEG", 6), ("moco_v2", 2.5, "MPO", 6)],
)
def test_a_jpeg_decoded_at_a_reduced_size_is_nearly_the_same(tmp_path, spy, name, levels, format, orientation):
    pictures = {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]} if format == "MPO" else {}
    photograph(tmp_path / "large.jpg", exif=oriented(orientation), format=format, **pictures)
    assert Image.open(tmp_path / "large.jpg").format == format
    whole = transforms.to_rgb(Image.open(tmp_path / "large.jpg"))
    load = spy(transforms, "to_rgb")
    for seed in range(4):
        for view in views_of(name, 96):
            views = []
            for image in (Image.open(tmp_path / "large.jpg"), whole):
                torch.manual_seed(seed)
                views.append(view(image))
            assert (views[0] - views[1]).abs().mean() * 255 * min(transforms.IMAGENET_STD) < levels
    assert any(max(image.size) <= 605 for (image,), _ in load.call_args_list)


def test_evaluation_decodes_twice_as_many_pixels_as_it_shows(tmp_path, spy):
    """But all pixels where an image is turned whose last block is not whole."""
    load = spy(transforms, "to_rgb")
    for size, turn, shrunk in (((256, 256), 1, (128, 128)), ((257, 256), 3, (257, 256)), ((256, 257), 3, (256, 257))):
        photograph(tmp_path / "large.jpg", size, exif=oriented(turn))
        transforms.eval_transform(64)(Image.open(tmp_path / "large.jpg"))
        [image], _ = load.call_args
        assert image.size == shrunk


@pytest.mark.parametrize("orientation", [9, 65535, "6", b"\x06"])
def test_an_orientation_that_makes_no_sense_is_upright(tmp_path, monkeypatch, orientation):
    Image.new("RGB", (400, 200), "white").save(tmp_path / "odd.jpg")
    monkeypatch.setattr(Image.Image, "getexif", lambda self: {274: orientation})
    assert transforms.to_rgb(Image.open(tmp_path / "odd.jpg")).size == (400, 200)
    view = transforms.eval_transform(64)(Image.open(tmp_path / "odd.jpg"))
    assert view.amin((1, 2)).tolist() == view.amax((1, 2)).tolist()  # white to the edges


def test_crop_min_is_the_least_share_of_an_image_that_is_shown():
    """A gradient from left to right: how much of it a crop spans tells its width."""
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1)))
    for share, least in ((1.0, 195), (0.05, 0)):
        torch.manual_seed(0)
        crop = transforms.train_transform(64, "crop", share, mean=(0, 0, 0), std=(1, 1, 1))
        spans = [float(np.ptp(crop(ramp).numpy()) * 255) for _ in range(30)]
        assert min(spans) >= least and (share == 1.0 or min(spans) < 100)
