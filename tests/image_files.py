"""Files that tests make: images in the format of their suffix; in memory whatever writes into a file, and archives."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def bytes_of(write, *args, **options) -> bytes:
    """What `write(file, *args, **options)` writes."""
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


def tar_of(files: dict[str, bytes]) -> bytes:
    """A tar archive of these files."""
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
