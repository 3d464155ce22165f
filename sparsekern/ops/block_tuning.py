"""Tile sizes of the block kernels: a table for the H200, and a safe default elsewhere.

Nothing in this table has been measured on a GPU. It follows from counts: x crosses from L2 to a
multiprocessor once for every row of blocks, so a tile does at most R operations for each byte of
x in 16 bits, whatever its number of tokens; what is left to choose are tiles of which two fit on a
multiprocessor, so that one loads while the other multiplies, and that keep their pointers in
registers (256 x 128 spills, except with the copy engine). `tune` measures instead.
"""

import itertools
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


# H200, predicted: (bytes of an element, outputs of a block up to, tokens up to) -> config; the
# first line that fits. Blocks of fewer outputs than a tile has take a tile of their own height.
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
    return max(1, CHUNK_COLUMNS // _power(width))


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _fit(config: SpmmConfig, tokens: int, height: int, depth: int) -> SpmmConfig:
    """Cut a config to few tokens and to a block; a step takes several blocks of 32 or less."""
    return replace(
        config,
        tokens=max(16, min(config.tokens, _power(tokens))),
        height=max(16, min(config.height, _power(height))),
        depth=config.depth if depth <= 32 else min(config.depth, _power(depth)),
    )


def table_config(itemsize: int, tokens: int, height: int, depth: int) -> SpmmConfig:
    """The config of the H200 table for blocks of `height` outputs x `depth` inputs."""
    for (size, highest, most), config in H200.items():
        if size == itemsize and height <= highest and tokens <= most:
            return _fit(config, tokens, height, depth)
    raise ValueError(f"table_config: expected elements of 2 or 4 bytes, got {itemsize}")


def default_config(itemsize: int, tokens: int, height: int, depth: int) -> SpmmConfig:
    """Tiles that every device with tensor cores can hold (at most 48 KB of shared memory)."""
    return _fit(SpmmConfig(64, 64, 128 // itemsize), tokens, height, depth)


def spmm_config(x, n_blocks: int, rows: int, block, processors: int) -> SpmmConfig:
    """The config for x (T, inner) and `n_blocks` blocks of (outputs, inputs) in `rows` rows."""
    tokens, itemsize = x.shape[0], x.element_size()
    found = tuned.get(_key(x, block))
    if found is None:
        choose = table_config if _is_h200(x.device) else default_config
        found = choose(itemsize, tokens, *block)
    return replace(found, split=_split(found, tokens, n_blocks, rows, block, processors))


def _split(config, tokens, n_blocks, rows, block, processors) -> int:
    """Parts of a row such that two programs per processor have work; each at least four steps."""
    tiles = -(-tokens // config.tokens) * rows * -(-block[0] // config.height)
    steps = n_blocks * _power(block[1]) // (max(1, rows) * config.depth)
    split = 1
    while tiles * split < processors and split < 16 and steps >= 8 * split:
        split *= 2
    return split


def grad_config(x, chunks: int, block, processors: int) -> GradConfig:
    """The config of the weight gradient for `chunks` chunks of blocks (outputs, inputs)."""
    rows = max(16, min(128, _power(block[0])))
    step = 128 // x.element_size()
    programs = chunks * -(-block[0] // rows) * -(-block[1] // CHUNK_COLUMNS)
    split = 1
    while programs * split < processors and split < 16 and x.shape[0] >= 8 * step * split:
        split *= 2
    return GradConfig(rows, CHUNK_COLUMNS, step, 8 if rows == 128 else 4, 3, split)


# What `tune` found in this process: (device, dtype, block, token class) -> config.
tuned: dict[tuple, SpmmConfig] = {}


def _key(x, block) -> tuple:
    return str(x.device), x.dtype, tuple(block), min(_power(x.shape[0]), 4096)


def _is_h200(device: torch.device) -> bool:
    return device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)


def candidates(itemsize: int, tokens: int, height: int, depth: int) -> list[SpmmConfig]:
    """A short list to measure: the table's and the default's choice and their neighbours."""
    table = table_config(itemsize, tokens, height, depth)
    default = default_config(itemsize, tokens, height, depth)
    found = [table, default, replace(table, stages=max(2, table.stages - 1))]
    if tokens > 64:
        half = replace(table, tokens=max(64, table.tokens // 2))
        found += [half, replace(table, persistent=0 if table.persistent else 2)]
        found += [replace(table, warps=8), replace(half, persistent=4)]
    return list(dict.fromkeys(found))


def tune(run, x, block, fits_tma: bool = False) -> SpmmConfig:
    """Measure the candidates for x and keep the fastest for this device, dtype and token class.

    Args:
        run: Called with a config, does the product on the device.
        x: `(T, inner)`, on the device.
        block: Outputs and inputs of a block.
        fits_tma: Whether the copy engine may be tried, too.
    """
    configs = candidates(x.element_size(), x.shape[0], *block)
    limit = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    if fits_tma:  # without pointers in registers there is room for twice the tokens
        wide = [replace(c, tokens=2 * c.tokens) for c in configs if c.tokens == 128]
        configs += [replace(c, tma=True) for c in [*configs, *wide] if c.depth <= block[1]]
    configs = [c for c in configs if c.shared_bytes(x.element_size()) <= limit]
    times = {config: _milliseconds(run, config) for config in configs}
    tuned[_key(x, block)] = best = min(times, key=times.get)
    return best


def _milliseconds(run, config: SpmmConfig, repeats: int = 20) -> float:
    """Median time of a call, by events of the device; infinite if the device refuses the config."""
    try:
        for _ in range(3):
            run(config)
    except Exception as error:  # what Triton raises for too many resources differs by version
        if "out of resource" not in str(error):
            raise
        return float("inf")
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for mark in marks[:-1]:
        mark.record()
        run(config)
    marks[-1].record()
    marks[-1].synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return times[repeats // 2]
