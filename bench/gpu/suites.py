"""What is measured on a GPU, and what each figure should reach. Data, no timing.

Shapes (out, in) are those of public work on sparse kernels: Llama, Qwen and OPT layers as measured
with cuSPARSELt by SlideSparse (arXiv 2603.05232), Flash-LLM and SpInfer. In every suite the points
come in order of importance, since a suite ends when its time is up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cases import Case, Conv, Linear

SQUARE, UP, DOWN = (4096, 4096), (14336, 4096), (4096, 14336)  # Llama-3-8B
LLM = (
    SQUARE, UP, DOWN, (8192, 8192), (28672, 8192), (8192, 28672), (11008, 4096), (4096, 11008),
    (5120, 5120), (27648, 5120), (5120, 13824), (18944, 3584), (3584, 18944), (2048, 2048),
    (16384, 2048), (2048, 8192), (16384, 3072), (3072, 8192),
)  # fmt: skip
RESNET = (  # ResNet-50: in, out, size of the input, kernel
    (256, 256, 14, 3), (128, 128, 28, 3), (64, 64, 56, 3), (512, 512, 7, 3),
    (1024, 256, 14, 1), (256, 1024, 14, 1), (256, 64, 56, 1), (512, 2048, 7, 1),
)  # fmt: skip
DECODE_GOAL = {0.5: 1.3, 0.7: 2.0, 0.9: 3.5}
BLOCK_CROSSOVER = {32: 0.5, 16: 0.65}


@dataclass(frozen=True)
class Work:
    """One point.

    Attributes:
        case: The layer.
        pattern: Pattern of the zeros.
        sparsity: Share of zeros.
        dtype: `bfloat16`, `float16`, `float32`.
        goal: Least speed-up over the best dense side; None where none was set.
        compiled: Whether torch.compile's dense layer takes part; compiling takes a while.
        energy: Whether joules are measured as well.
        graphs: Whether the converter times, and is timed, by CUDA graphs.
    """

    case: Case
    pattern: str
    sparsity: float
    dtype: str
    goal: float | None = None
    compiled: bool = False
    energy: bool = False
    graphs: bool = False

    @property
    def key(self) -> str:
        """Name of the point in a journal, without its suite."""
        name = f"{self.case.name} {self.pattern} {self.sparsity:g} {self.dtype}"
        return f"{name} graphs" if self.graphs else name


def _linear(shape: tuple[int, int], tokens: int, training: bool = False) -> Linear:
    rows, cols = shape
    return Linear(cols, rows, tokens, training)


def nm_prefill() -> Iterator[Work]:
    """2:4 where arithmetic counts."""
    for tokens, shapes in ((4096, LLM), (2048, LLM), (8192, LLM[:6]), (512, LLM[:3])):
        for shape in shapes:
            goal = 1.5 if tokens >= 2048 else None
            yield Work(_linear(shape, tokens), "2:4", 0.5, "bfloat16", goal)
    yield Work(_linear(SQUARE, 1024), "2:4", 0.5, "bfloat16", compiled=True)
    for dtype in ("float16", "float32"):
        yield Work(_linear(SQUARE, 4096), "2:4", 0.5, dtype)


def nm_decode() -> Iterator[Work]:
    """2:4 where reading the weights counts."""
    for tokens, shapes in ((1, LLM), (16, LLM), (64, LLM[:6]), (8, LLM[:3]), (32, LLM[:3])):
        for shape in shapes:
            yield Work(_linear(shape, tokens), "2:4", 0.5, "bfloat16", 1.4)


def block() -> Iterator[Work]:
    """Blocks: 64 and 128 against their limit, 32 and 16 against their crossover."""
    for shape in (SQUARE, UP, DOWN):
        for size in (64, 128, 32, 16):
            for sparsity in (0.8, 0.5, 0.9, *((0.65,) if size == 16 else ())):
                goal = 0.85 / (1 - sparsity) if size >= 64 else None
                if goal is None and sparsity >= BLOCK_CROSSOVER[size]:
                    goal = 1.0
                pattern = f"block:{size}x{size}"
                yield Work(_linear(shape, 4096), pattern, sparsity, "bfloat16", goal)
    for tokens in (1, 64, 512):
        yield Work(_linear(UP, tokens), "block:64x64", 0.8, "bfloat16")
    yield Work(_linear(SQUARE, 4096), "block:64x64", 0.8, "float16", 0.85 / 0.2)
    yield Work(_linear(SQUARE, 4096), "vector:4x1", 0.9, "bfloat16")


def decode() -> Iterator[Work]:
    """Unstructured weights, few tokens."""
    for tokens, shapes in ((1, LLM[:6]), (8, LLM[:3]), (4, LLM[:3]), (16, LLM[:1]), (64, LLM[:1])):
        for shape in shapes:
            for sparsity in (0.5, 0.7, 0.9):
                goal = DECODE_GOAL[sparsity] if tokens <= 8 else None
                yield Work(_linear(shape, tokens), "unstructured", sparsity, "bfloat16", goal)
    for sparsity in (0.5, 0.9):
        yield Work(_linear(SQUARE, 1), "unstructured", sparsity, "float16", DECODE_GOAL[sparsity])


def csr() -> Iterator[Work]:
    """Unstructured float32 where cuSPARSE is at home; bfloat16 at many tokens to know the limit."""
    for shape in (SQUARE, (3072, 768), (768, 3072), (11008, 4096), (1024, 1024)):
        for sparsity in (0.95, 0.9, 0.98):
            goal = 1.0 if sparsity >= 0.95 else None
            yield Work(_linear(shape, 512), "unstructured", sparsity, "float32", goal)
    for sparsity in (0.95, 0.98):
        yield Work(_linear(SQUARE, 2048), "unstructured", sparsity, "bfloat16")


def conv() -> Iterator[Work]:
    """Convolutions of ResNet-50, batch 32; a few of batch 1, where reading the weight counts."""
    for channels, out, size, kernel in RESNET:
        case = Conv(32, channels, out, size, kernel)
        for pattern, sparsity in (("block:32x32", 0.8), ("2:4", 0.5), ("unstructured", 0.95)):
            yield Work(case, pattern, sparsity, "bfloat16")
    for case in (Conv(1, 512, 512, 7, 3), Conv(1, 256, 256, 14, 3)):
        for pattern, sparsity in (("unstructured", 0.9), ("2:4", 0.5)):
            yield Work(case, pattern, sparsity, "bfloat16")
        yield Work(case, "unstructured", 0.95, "float32")


def training() -> Iterator[Work]:
    """Forward and the gradients of input, weight and bias."""
    for pattern, sparsity in (("block:64x64", 0.8), ("2:4", 0.5), ("unstructured", 0.95)):
        yield Work(_linear(SQUARE, 4096, training=True), pattern, sparsity, "bfloat16")
    yield Work(_linear(SQUARE, 512, training=True), "unstructured", 0.95, "float32")
    yield Work(_linear(SQUARE, 4096, training=True), "2:4T", 0.5, "bfloat16")
    case = Conv(32, 256, 256, 14, 3, training=True)
    for pattern, sparsity in (("block:32x32", 0.8), ("unstructured", 0.95), ("2:4T", 0.5)):
        yield Work(case, pattern, sparsity, "bfloat16")


def energy() -> Iterator[Work]:
    """Joules of a call by the card's counter: seconds for each, so only a few."""
    points = (
        (SQUARE, 4096, "2:4", 0.5), (UP, 4096, "block:64x64", 0.8), (UP, 1, "unstructured", 0.7)
    )  # fmt: skip
    for shape, tokens, pattern, sparsity in points:
        yield Work(_linear(shape, tokens), pattern, sparsity, "bfloat16", energy=True)


def converter() -> Iterator[Work]:
    """convert_to_sparse must not lose on any of these, whatever it chooses."""
    for tokens, graphs in ((4096, False), (1, True), (1, False)):
        for pattern, sparsity in (("2:4", 0.5), ("block:64x64", 0.8), ("unstructured", 0.9)):
            case = _linear(SQUARE, tokens)
            yield Work(case, pattern, sparsity, "bfloat16", 0.95, graphs=graphs)
    yield Work(_linear(SQUARE, 512), "unstructured", 0.95, "float32", 0.95)
    yield Work(Conv(32, 256, 256, 14, 3), "block:32x32", 0.8, "bfloat16", 0.95)


def host() -> Iterator[Work]:
    """Layers so small that the host takes longer than the device: what a call takes it."""
    cases = (_linear((512, 512), 1), Conv(1, 64, 64, 8, 1), Conv(1, 64, 64, 8, 3))
    for case in cases:
        for pattern, sparsity in (("unstructured", 0.9), ("2:4", 0.5), ("block:32x32", 0.5)):
            yield Work(case, pattern, sparsity, "bfloat16")


# Name -> (points, share of the time that is left for sweeps). The order is that of a run.
SUITES = {
    "nm_decode": (nm_decode, 3),
    "decode": (decode, 4),
    "block": (block, 4),
    "nm_prefill": (nm_prefill, 4),
    "csr": (csr, 2),
    "conv": (conv, 2),
    "host": (host, 1),
    "converter": (converter, 2),
    "training": (training, 1),
    "energy": (energy, 2),
}
