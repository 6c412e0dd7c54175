"""Decoded images that stay in memory: a run reads each of its images some ten times, and decodes it once."""

import mmap
import multiprocessing

import numpy as np

KEPT_BYTES = 2**30  # at the most, of all images that a process and those that load for it read
VERSIONS = 5  # of an image: as it is, or a JPEG decoded at 1, 1/2, 1/4, 1/8 of its size


class KeptArrays:
    """Arrays (H, W, channels) by an image's number and version, while there is room. Forked processes share them."""

    def __init__(self, images: int, room: int, channels: int = 3, dtype: type = np.uint8):
        self.channels = channels
        self.dtype = np.dtype(dtype)
        self.memory = mmap.mmap(-1, room)  # what is never written to takes no memory
        self.used = np.ndarray(1, np.int64, mmap.mmap(-1, 8))  # bytes
        places = mmap.mmap(-1, 24 * VERSIONS * images)
        self.places = np.ndarray((images, VERSIONS, 3), np.int64, places)  # first byte, height, width; 0: none
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
        return np.ndarray((height, width, self.channels), self.dtype, self.memory, first).copy()

    def put(self, image: int, version: int, array: np.ndarray) -> None:
        if not self.lock.acquire(block=False):
            return
        first = int(self.used[0])
        if first + array.nbytes <= len(self.memory):
            np.ndarray(array.shape, self.dtype, self.memory, first)[:] = array
            self.used[0] += array.nbytes
            self.places[image, version] = first, *array.shape[:2]
        self.lock.release()
