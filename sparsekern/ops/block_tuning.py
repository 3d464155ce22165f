"""Tile sizes of the block kernels: a table for Hopper, a safe default, and what is worth timing.

Nothing in the table has been measured on a GPU. It follows from counts: x crosses from L2 to a
multiprocessor once for every row of blocks, so a tile does at most R operations for each byte of
x in 16 bits, whatever its number of tokens. More tokens make the values cost less, and are bounded
by registers (256 x 128 spills, except with the copy engine); low blocks want two tiles on a
multiprocessor instead, so that one loads while the other multiplies. On the device the `candidates`
are timed against each other, see `cuda_choice`; the first one serves until then.
"""

import functools
from dataclasses import dataclass, replace

import torch

from .cuda_support import power_of_two

WORTH_TIMING = 2**26  # multiplications, about 1 us of the tensor cores of an H200 in 16 bits
CHUNK_COLUMNS = 128  # columns of x that a program of the weight gradient takes at least


@dataclass(frozen=True)
class SpmmConfig:
    """How the product is cut.

    Attributes:
        tokens: Tokens of a tile.
        height: Outputs of a tile, at most a padded block.
        depth: Inputs of a step; several blocks if it is more than a block has.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        persistent: Programs per multiprocessor that take tile after tile; 0 for one per tile.
        tma: Load with the copy engine (Hopper and later).
        split: Parts of a row of blocks; 0 for as many as give all multiprocessors work.
    """

    tokens: int
    height: int
    depth: int
    warps: int = 4
    stages: int = 3
    persistent: int = 0
    tma: bool = False
    split: int = 0

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory that the tiles of the pipeline take."""
        return (self.tokens + self.height) * self.depth * itemsize * self.stages


@dataclass(frozen=True)
class GradConfig:
    """How the weight gradient is cut: rows x cols of a tile, tokens of a step."""

    rows: int
    cols: int
    tokens: int
    warps: int = 4
    stages: int = 3
    split: int = 1


# H100 and H200, which have the same multiprocessors, predicted: (bytes of an element, outputs of a
# block up to, tokens up to) -> config; the first line that fits. Blocks of fewer outputs than a
# tile has take a tile of their own height.
LARGE = 2**62
HOPPER = {
    (2, 32, 32): SpmmConfig(32, 32, 128, 4, 4),
    (2, 32, 64): SpmmConfig(64, 32, 128, 4, 4),
    (2, 32, LARGE): SpmmConfig(128, 32, 64, 4, 4),
    (2, 64, 32): SpmmConfig(32, 64, 64, 4, 5),
    (2, 64, 64): SpmmConfig(64, 64, 64, 4, 5),
    (2, 64, 512): SpmmConfig(128, 64, 64, 4, 4),
    (2, 64, LARGE): SpmmConfig(256, 64, 64, 8, 4),
    (2, LARGE, 32): SpmmConfig(32, 64, 64, 4, 5),
    (2, LARGE, 64): SpmmConfig(64, 64, 64, 4, 5),
    (2, LARGE, LARGE): SpmmConfig(128, 128, 64, 8, 4),
    (4, LARGE, 32): SpmmConfig(32, 64, 32, 4, 4),
    (4, LARGE, 64): SpmmConfig(64, 64, 32, 4, 4),
    (4, LARGE, LARGE): SpmmConfig(128, 64, 32, 8, 4),
}


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: `tf32` where torch may, else three TF32 products for float32."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3"


def chunk_blocks(width: int) -> int:
    """Blocks in a chunk of the weight gradient, for blocks of `width` inputs."""
    return max(1, CHUNK_COLUMNS // power_of_two(width))


def _fit(config: SpmmConfig, tokens: int, height: int, depth: int) -> SpmmConfig:
    """Cut a config to few tokens and to a block; a step takes several blocks of 32 or less."""
    return replace(
        config,
        tokens=max(16, min(config.tokens, power_of_two(tokens))),
        height=max(16, min(config.height, power_of_two(height))),
        depth=config.depth if depth <= 32 else min(config.depth, power_of_two(depth)),
    )


def table_config(itemsize: int, tokens: int, height: int, depth: int) -> SpmmConfig:
    """The config of the table for Hopper for blocks of `height` outputs x `depth` inputs."""
    for (size, highest, most), config in HOPPER.items():
        if size == itemsize and height <= highest and tokens <= most:
            return _fit(config, tokens, height, depth)
    raise ValueError(f"table_config: expected elements of 2 or 4 bytes, got {itemsize}")


def default_config(itemsize: int, tokens: int, height: int, depth: int) -> SpmmConfig:
    """Tiles that every device with tensor cores can hold (at most 48 KB of shared memory)."""
    return _fit(SpmmConfig(64, 64, 128 // itemsize), tokens, height, depth)


@functools.lru_cache(maxsize=1024)
def with_split(config: SpmmConfig, tokens: int, n_blocks: int, rows: int, block, processors: int):
    """The config with the parts of a row settled, for `n_blocks` blocks (outputs, inputs).

    As many parts as give every multiprocessor a program, each of at least four steps on average.
    """
    if config.split:
        return config
    tiles = -(-tokens // config.tokens) * rows * -(-block[0] // config.height)
    steps = n_blocks * power_of_two(block[1]) // (max(1, rows) * config.depth)
    split = 1
    while tiles * split < processors and split < 16 and steps >= 8 * split:
        split *= 2
    return replace(config, split=split)


def grad_config(x, chunks: int, block, processors: int, tokens: int = 0) -> GradConfig:
    """The config of the weight gradient for `chunks` chunks of blocks (outputs, inputs).

    `tokens` is what is summed over, by default the rows of x.
    """
    tokens = tokens or x.shape[0]
    rows = max(16, min(128, power_of_two(block[0])))
    step = 128 // x.element_size()
    programs = chunks * -(-block[0] // rows) * -(-block[1] // CHUNK_COLUMNS)
    split = 1
    while programs * split < processors and split < 16 and tokens >= 8 * step * split:
        split *= 2
    return GradConfig(rows, CHUNK_COLUMNS, step, 8 if rows == 128 else 4, 3, split)


def worth_timing(configs: dict[str, SpmmConfig], tokens: int, stored: int):
    """All configs for a product of some size, only the first for a small one.

    Each config costs seconds to compile, and where all of them take microseconds nobody gains. Few
    tokens count as 64: their time is that of reading the values.
    """
    large = max(tokens, 64) * stored >= WORTH_TIMING
    return configs if large else dict(list(configs.items())[:1])


@functools.lru_cache(maxsize=1024)
def candidates(
    device: torch.device, itemsize: int, tokens: int, block: tuple[int, int], inner: int = 0
) -> dict[str, SpmmConfig]:
    """A short list to time, by name, the most promising first: table, default, their neighbours.

    Args:
        device: Where.
        itemsize: Bytes of an element.
        tokens: Tokens, best rounded up to a power of two, so that few lists are made.
        block: Outputs and inputs of a block.
        inner: Inputs of the weight; 0 and what is no multiple of the block exclude the copy engine.
    """
    table, safe = (f(itemsize, tokens, *block) for f in (table_config, default_config))
    major, limit = _device(device)
    found = [table, safe] if major == 9 else [safe, table]
    found.append(replace(table, stages=max(2, table.stages - 1)))
    if tokens > 64:
        half = replace(table, tokens=max(64, table.tokens // 2), warps=4)
        found += [half, replace(table, persistent=2), replace(table, warps=12 - table.warps)]
    if tokens > 64 and major >= 9 and _fits_copy_engine(table, block, inner, itemsize):
        # Without pointers in registers there is room for more tokens.
        found.append(replace(table, tma=True))
        found.append(replace(table, tokens=256, warps=8, tma=True))
    return {str(c): c for c in found if c.shared_bytes(itemsize) <= limit}


def _fits_copy_engine(config: SpmmConfig, block, inner: int, itemsize: int) -> bool:
    """Whole blocks only, each side a power of two, and rows at multiples of 16 bytes."""
    whole = inner and inner % block[1] == 0 and all(side == power_of_two(side) for side in block)
    wide = min(block[1], config.depth, config.height, block[0]) * itemsize >= 16
    return whole and wide and config.depth <= block[1]


def _device(device: torch.device) -> tuple[int, int]:
    """Major compute capability and bytes of shared memory; those of an A100 on the CPU."""
    if device.type != "cuda":
        return 8, 166_912
    facts = torch.cuda.get_device_properties(device)
    return facts.major, facts.shared_memory_per_block_optin
