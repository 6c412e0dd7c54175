"""Files that tests make: images in the format of their suffix, archives, bytes; and what it takes to read them."""

import contextlib
import io
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

UTM = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32632)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        write(folder / name, b"")


def bytes_of(write, *args, **options) -> bytes:
    """What `write(file, *args, **options)` writes."""
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


def tar_of(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def labelled_tar(images: list[Path]) -> bytes:
    """An archive of images that has the class of each, the name of its folder, beside it."""
    files = {}
    for number, image in enumerate(images):
        files |= {f"{number}{image.suffix}": image.read_bytes(), f"{number}.cls": image.parent.name.encode()}
    return tar_of(files)


def png_of(width: int, height: int, bits: int, colours: int, rows: bytes) -> bytes:
    """A PNG that says to be of this size, these bits and this type of colours; each row begins with its filter, 0."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png


def oriented(orientation: int) -> Image.Exif:
    """What a camera writes into the file of a picture that it held otherwise; 6: it is stored on its side."""
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def save_image(path: Path, pixels: np.ndarray | Image.Image, **how) -> Path:
    """Save it in the format of its suffix: .npy, a TIFF as tifffile writes arrays, or whatever Pillow writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    elif isinstance(pixels, Image.Image):
        pixels.save(path, **how)
    elif path.suffix == ".tif":
        import tifffile

        tifffile.imwrite(path, pixels, **how)
    else:
        Image.fromarray(pixels).save(path, **how)
    return path


def geotags(keys=UTM, matrix=None) -> list[tuple]:
    """What tifffile writes as `extratags` of an image whose pixels are 10 m large, in a UTM zone."""
    tags = [(34735, "H", len(keys), keys, True), (34736, "d", 2, (6378137.0, 298.25), True)]
    tags.append((34737, "s", 0, "Réseau géodésique, UTM zone 32N|".encode(), True))
    if matrix is not None:
        return [*tags, (34264, "d", 16, matrix, True)]
    scale = (33550, "d", 3, (10.0, 10.0, 0.0), True)
    return [*tags, scale, (33922, "d", 6, (0.0, 0.0, 0.0, 500000.0, 5400000.0, 0.0), True)]


@contextlib.contextmanager
def little_memory(most: int = 2 * 10**7):
    """What is allocated within the block stays below `most` bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
