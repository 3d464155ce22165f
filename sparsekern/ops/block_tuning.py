"""Tile sizes of the block kernels: a table for the H200, and a safe default elsewhere.

Nothing in this table has been measured on a GPU. It follows from counts: x crosses from L2 to a
multiprocessor once for every row of blocks, so a tile does at most 2 R operations for each 2 bytes
of x, whatever its number of tokens; tall blocks want tiles of 256 tokens so that the values do not
cost as much again, short ones want two resident tiles to hide latency. `tune` measures instead.
"""

from dataclasses import dataclass, replace

import torch

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
        split: Parts of a row of blocks.
    """

    tokens: int
    height: int
    depth: int
    warps: int = 4
    stages: int = 3
    persistent: int = 0
    tma: bool = False
    split: int = 1

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


# H200, predicted: (bytes of an element, outputs of a block up to, tokens up to) -> config; the first
# line that fits. Blocks of fewer outputs than the tile is high take a tile of their own height.
LARGE = 2**62
H200 = {
    (2, 32, 32): SpmmConfig(32, 32, 128, 4, 4),
    (2, 32, 64): SpmmConfig(64, 32, 128, 4, 4),
    (2, 32, LARGE): SpmmConfig(128, 32, 64, 4, 4),
    (2, 64, 32): SpmmConfig(32, 64, 64, 4, 5),
    (2, 64, 64): SpmmConfig(64, 64, 64, 4, 5),
    (2, 64, LARGE): SpmmConfig(128, 64, 64, 4, 4),
    (2, LARGE, 32): SpmmConfig(32, 64, 64, 4, 5),
    (2, LARGE, 64): SpmmConfig(64, 64, 64, 4, 5),
    (2, LARGE, 512): SpmmConfig(128, 128, 64, 8, 4),
    (2, LARGE, LARGE): SpmmConfig(256, 128, 64, 8, 3, persistent=1),
    (4, LARGE, 32): SpmmConfig(32, 64, 32, 4, 4),
    (4, LARGE, 64): SpmmConfig(64, 64, 32, 4, 4),
    (4, LARGE, LARGE): SpmmConfig(128, 64, 32, 4, 4),
}


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: `tf32` where torch may, else three TF32 products for float32."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3"


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _fit(config: SpmmConfig, tokens: int, height: int, depth: int) -> SpmmConfig:
    """Cut a config to a block: no higher than it, no deeper unless several blocks fit in a step."""
    return replace(
        config,
        tokens=max(16, min(config.tokens, _power(tokens))),
        height=max(16, min(config.height, _power(height))),
        depth=max(32, min(config.depth, _power(depth))) if depth >= 32 else config.depth,
    )


def table_config(table: dict, itemsize: int, tokens: int, height: int, depth: int) -> SpmmConfig:
    """The config of a table for a block of `height` outputs x `depth` inputs."""
    for (size, highest, most), config in table.items():
        if size == itemsize and height <= highest and tokens <= most:
            return _fit(config, tokens, height, depth)
    raise KeyError(f"table_config: expected a line for {itemsize} bytes, got none")


def default_config(itemsize: int, tokens: int, height: int, depth: int) -> SpmmConfig:
    """Tiles that every device with tensor cores can hold (at most 72 KB of shared memory)."""
    return _fit(SpmmConfig(64, 128, 128 // itemsize), tokens, height, depth)
