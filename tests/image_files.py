"""Files that tests make in memory: whatever writes into a file, and archives."""

import io
import struct
import tarfile
import zlib


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


def png_of(width: int, height: int, bits: int, colours: int, rows: bytes) -> bytes:
    """A PNG that says to be of this size, these bits and this type of colours; each row begins with its filter, 0."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png
