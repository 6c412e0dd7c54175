"""Decoded images that stay in memory: a run reads each of its images some ten times, and decodes it once."""

import mmap
import multiprocessing

import numpy as np

KEPT_BYTES = 2**30  # at the most, of all images that a process and those that load for it read
VERSIONS = 5  # of an image: as it is, or a JPEG decoded at 1, 1/2, 1/4, 1/8 of its size


class KeptArrays:
    """Arrays (H, W, channels), as far as there is room, by an image's number and version. Forked processes share them.

    Raises OSError where the machine does not give so many bytes.
    """

    def __init__(self, images: int, room: int, channels: int = 3, dtype: type = np.uint8):
        self.channels = channels
        self.dtype = np.dtype(dtype)
        self.memory = mmap.mmap(-1, room)  # what is never written to takes no memory
        self.used = np.frombuffer(mmap.mmap(-1, 8), np.int64)  # bytes, (1,)
        places = np.frombuffer(mmap.mmap(-1, 24 * VERSIONS * images), np.int64)
        self.places = places.reshape(images, VERSIONS, 3)  # first byte, height, width; all 0: it is not here
        # Nobody waits for it: a process that was killed may have left it locked.
        self.lock = multiprocessing.Lock()

    def get(self, image: int, version: int) -> np.ndarray | None:
        """A copy of what was put there, if that is here."""
        if not self.lock.acquire(block=False):
            return None
        first, height, width = self.places[image, version].tolist()
        self.lock.release()
        if height == 0:
            return None
        values = np.frombuffer(self.memory, self.dtype, height * width * self.channels, first)
        return values.reshape(height, width, self.channels).copy()

    def put(self, image: int, version: int, array: np.ndarray) -> None:
        """Keep an array, if there is room."""
        if not self.lock.acquire(block=False):
            return
        first = int(self.used[0])
        if first + array.nbytes <= len(self.memory):
            np.frombuffer(self.memory, self.dtype, array.size, first)[:] = array.ravel()
            self.used[0] += array.nbytes
            self.places[image, version] = first, *array.shape[:2]
        self.lock.release()
