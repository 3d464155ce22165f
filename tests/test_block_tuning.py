"""Which tiles are chosen and timed for blocks; nothing here needs Triton or a GPU."""

from types import SimpleNamespace

import pytest
import torch

from sparsekern.ops import block_tuning
from sparsekern.ops.block_tuning import (
    HOPPER,
    SpmmConfig,
    candidates,
    default_config,
    grad_config,
    precision,
    table_config,
    with_split,
    worth_timing,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    facts = SimpleNamespace(major=9, shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    candidates.cache_clear()
    yield
    candidates.cache_clear()


def test_every_entry_fits_the_shared_memory_of_a_hopper():
    for (itemsize, _, _), config in HOPPER.items():
        assert config.shared_bytes(itemsize) <= 232_448
    for tokens in (1, 100, 5000):
        assert default_config(2, tokens, 128, 128).shared_bytes(2) <= 48 * 1024


def test_configs_are_cut_to_the_block_and_the_tokens():
    assert table_config(2, 1, 128, 128).tokens == 16
    assert table_config(2, 5000, 24, 100).height == 32
    assert table_config(2, 5000, 16, 16).depth == 64  # four blocks in a step
    assert table_config(2, 5000, 64, 64).depth == 64
    with pytest.raises(ValueError, match="expected elements of 2 or 4 bytes, got 8"):
        table_config(8, 1, 16, 16)


def test_the_table_comes_first_on_hopper_only(hopper):
    table, safe = table_config(2, 4096, 128, 128), default_config(2, 4096, 128, 128)
    found = candidates(CUDA, 2, 4096, (128, 128), 4096)
    assert next(iter(found.values())) == table and safe in found.values()
    assert any(c.tma and c.tokens == 256 for c in found.values())
    assert next(iter(candidates(CPU, 2, 4096, (128, 128), 4096).values())) == safe


@pytest.mark.parametrize("inner", [0, 4000])
def test_no_copy_engine_for_ragged_edges(hopper, inner):
    assert not any(c.tma for c in candidates(CUDA, 2, 4096, (128, 128), inner).values())
    assert not any(c.tma for c in candidates(CUDA, 2, 4096, (16, 16), 4096).values())


def test_small_products_are_not_timed():
    configs = {"a": SpmmConfig(64, 64, 64), "b": SpmmConfig(64, 64, 32)}
    assert list(worth_timing(configs, 1, 1000)) == ["a"]
    assert worth_timing(configs, 1, 2_000_000) == configs


def test_rows_are_split_only_where_tiles_are_few():
    config = SpmmConfig(64, 64, 64)
    assert with_split(config, 4096, 3000, 64, (64, 64), 132).split == 1
    assert with_split(config, 16, 3000, 64, (64, 64), 132).split == 4
    assert with_split(config, 16, 64, 64, (64, 64), 132).split == 1  # one step in each row
    assert grad_config(torch.empty(4096, 0), 4, (128, 128), 132).split == 16
    assert grad_config(torch.empty(4096, 0), 400, (128, 128), 132).split == 1


def test_float32_is_exact_unless_torch_may_use_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert precision(torch.float32) == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = False
        assert precision(torch.float32) == "tf32x3"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert block_tuning.chunk_blocks(16) == 8 and block_tuning.chunk_blocks(200) == 1
