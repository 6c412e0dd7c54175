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


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
