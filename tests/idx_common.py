"""Small data sets in the files of Fashion-MNIST."""

import gzip
import struct
from pathlib import Path

import numpy as np

FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_files(folder: Path, counts=(20, 10), zipped: bool = True) -> None:
    """Images of noise around one random image per class, in the four files."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    means = generator.integers(0, 156, (10, 28, 28))
    for (images, labels), count in zip(FILES, counts):
        classes = np.arange(count) % 10
        pixels = means[classes] + generator.integers(0, 100, (count, 28, 28))
        for name, array in ((images, pixels), (labels, classes)):
            content = gzip.compress(idx(array)) if zipped else idx(array)
            (folder / (name + ".gz" * zipped)).write_bytes(content)
