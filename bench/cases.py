"""What is measured: layers at the shapes people use, in named suites. Data, no timing.

A new kernel adds its shapes here; `run.py` measures every suite the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.patterns import NM, parse

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
WIDE = (*SPARSITIES, 0.98)


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b with x `(tokens, in)`, W `(out, in)`; training adds both gradients."""

    in_features: int
    out_features: int
    tokens: int
    training: bool = False

    kind = "linear"

    @property
    def name(self) -> str:
        """`linear 768-3072 T=512`: in, out, tokens."""
        sizes = f"{self.in_features}-{self.out_features} T={self.tokens}"
        return f"{'training ' if self.training else ''}linear {sizes}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of x."""
        return (self.tokens, self.in_features)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return (self.out_features, self.in_features)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The layer by torch's own function."""
        return F.linear(x, weight, bias)

    def layer(self) -> nn.Module:
        """The dense layer, without data."""
        return nn.Linear(self.in_features, self.out_features, device="meta")


@dataclass(frozen=True)
class Conv:
    """2-d convolution of square images, padding kernel // 2; `size` is that of the input.

    With groups each of them has one input channel: a depthwise convolution.
    """

    batch: int
    in_channels: int
    out_channels: int
    size: int
    kernel: int
    stride: int = 1
    training: bool = False
    groups: int = 1

    kind = "conv"

    @property
    def name(self) -> str:
        """`conv3x3 128-128@28 b1`: in, out, height = width of the input, batch; `depthwise3x3`."""
        stride = f" s{self.stride}" if self.stride > 1 else ""
        sizes = f"{self.in_channels}-{self.out_channels}@{self.size}{stride} b{self.batch}"
        prefix = "training " if self.training else ""
        kind = "conv" if self.groups == 1 else "depthwise"
        return f"{prefix}{kind}{self.kernel}x{self.kernel} {sizes}"

    @property
    def tokens(self) -> int:
        """Output pixels of the whole batch: how often each weight is used."""
        out = (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1
        return self.batch * out * out

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of x."""
        return (self.batch, self.in_channels, self.size, self.size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return (self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The layer by torch's own function."""
        padding = self.kernel // 2
        return F.conv2d(x, weight, bias, self.stride, padding, groups=self.groups)

    def layer(self) -> nn.Module:
        """The dense layer, without data."""
        return nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel, self.stride, self.kernel // 2,
            groups=self.groups, device="meta",
        )  # fmt: skip


Case = Linear | Conv


@dataclass(frozen=True)
class Suite:
    """Cases, and the sparsities to prune them to for each pattern."""

    cases: tuple[Case, ...]
    grid: tuple[tuple[str, tuple[float, ...]], ...] = (("unstructured", WIDE),)

    def points(
        self, patterns: list[str] | None, sparsities: list[float] | None
    ) -> Iterator[tuple[Case, str, float]]:
        """Every (case, pattern, sparsity).

        Args:
            patterns: Take only these of the suite's patterns; None takes all.
            sparsities: Use these instead of the suite's; N:M patterns, whose sparsity is fixed,
                stay only if it is among them.
        """
        for case, (pattern, own) in product(self.cases, self.grid):
            if patterns is not None and pattern not in patterns:
                continue
            wanted = own if sparsities is None else sparsities
            parsed = parse(pattern)
            if isinstance(parsed, NM):
                wanted = [s for s in wanted if s == parsed.sparsity]
            yield from ((case, pattern, s) for s in wanted)


TRANSFORMER = ((384, 1536), (1536, 384), (768, 3072), (3072, 768))  # MiniLM and BERT-base, in-out
RESNET_3X3 = ((64, 56), (128, 28), (256, 14), (512, 7))  # ResNet-50: channels, size
RESNET_3X3_STRIDE_2 = ((128, 56), (256, 28), (512, 14))
RESNET_1X1 = ((64, 256, 56), (256, 64, 56), (512, 128, 28), (1024, 256, 14), (2048, 512, 7))
MOBILENET_1X1 = (
    (16, 96, 112), (96, 24, 56), (144, 24, 56), (192, 32, 28), (384, 64, 14), (576, 96, 14),
    (960, 160, 7),
)  # fmt: skip
DEPTHWISE = (  # MobileNetV2: channels, size, stride
    (32, 112, 1), (96, 112, 2), (144, 56, 1), (192, 28, 1), (384, 14, 1), (576, 14, 2), (960, 7, 1),
)  # fmt: skip
TAILS = (15, 16, 17, 100, 128, 197)
ODD = ((1023, 1025), (1025, 1023), (1000, 513), (513, 1000))

_linear = (
    Linear(1024, 1024, 512),
    Linear(4096, 4096, 512),
    *(Linear(*sizes, tokens) for sizes in TRANSFORMER for tokens in (128, 512, 2048)),
)
_conv3x3 = tuple(
    Conv(batch, channels, channels, size, 3, stride)
    for stride, shapes in ((1, RESNET_3X3), (2, RESNET_3X3_STRIDE_2))
    for channels, size in shapes
    for batch in (1, 8)
)
_conv1x1 = tuple(Conv(batch, *shape, 1) for shape in RESNET_1X1 + MOBILENET_1X1 for batch in (1, 8))
_depthwise = tuple(
    Conv(batch, channels, channels, size, 3, stride, groups=channels)
    for channels, size, stride in DEPTHWISE
    for batch in (1, 8)
)
_decode = (Linear(11008, 4096, 1), Linear(4096, 11008, 1), Linear(1024, 1024, 1))
_training = (
    Linear(1024, 1024, 512, training=True),
    Linear(4096, 4096, 512, training=True),
    Conv(8, 128, 128, 28, 3, training=True),
)
_tails = (
    *(Linear(1024, 1024, tokens) for tokens in TAILS),
    *(Linear(*sizes, 128) for sizes in ODD),
)
_summary = (
    Linear(1024, 1024, 512),
    Linear(768, 3072, 512),
    Linear(4096, 4096, 512),
    Conv(1, 128, 128, 28, 3),
    Conv(8, 256, 256, 14, 3),
    Conv(1, 256, 64, 56, 1),
    Linear(11008, 4096, 1),
    Linear(1024, 1024, 512, training=True),
)

_int8 = tuple(Linear(size, size, tokens) for size in (1024, 4096) for tokens in (1, 16, 512))

BLOCKS = tuple((p, SPARSITIES) for p in ("block:16x16", "block:32x32", "vector:4x1"))
SUITES = {
    "summary": Suite(_summary, (("unstructured", SPARSITIES),)),
    "linear": Suite(_linear, (("unstructured", WIDE), ("2:4", (0.5,)), *BLOCKS)),
    "conv3x3": Suite(_conv3x3),
    "conv1x1": Suite(_conv1x1),
    "depthwise": Suite(_depthwise, (("unstructured", (0.0,)),)),
    "decode": Suite(_decode),
    "training": Suite(_training),
    "tails": Suite(_tails, (("unstructured", (0.9,)),)),
    "int8": Suite(_int8, (("unstructured", (0.5, 0.9)), *((p, (0.5, 0.9)) for p, _ in BLOCKS[:2]))),
    "overhead": Suite((Linear(64, 64, 1),), (("unstructured", (0.9,)),)),
}


@dataclass(frozen=True)
class Problem:
    """One point with its data.

    Attributes:
        case: The layer.
        pattern: Pattern of the zeros.
        sparsity: Share of zeros asked for.
        x: Input, contiguous.
        weight: Dense weight with zeros where `mask` is False.
        bias: `(out,)`.
        mask: Boolean, shape of the weight, True = kept.
        grad: Gradient of the output, for training.
    """

    case: Case
    pattern: str
    sparsity: float
    x: Tensor
    weight: Tensor
    bias: Tensor
    mask: Tensor
    grad: Tensor | None

    @property
    def nnz(self) -> int:
        """Weights kept."""
        return int(self.mask.sum())

    def flops(self, weights: int) -> float:
        """Operations of one call when `weights` weights take part: 2 per weight and token.

        A training step costs three such products: output, input gradient and weight gradient.
        """
        return 2.0 * weights * self.case.tokens * (3 if self.case.training else 1)

    def reference(self) -> tuple[Tensor, ...]:
        """Exact results in float64: (y,), or for training (dX, dW, db) with the dense dW."""
        leaves = [t.double() for t in (self.x, self.weight, self.bias)]
        if not self.case.training:
            return (self.case.apply(*leaves),)
        leaves = [t.requires_grad_() for t in leaves]
        return torch.autograd.grad(self.case.apply(*leaves), leaves, self.grad.double())


def build(
    case: Case,
    pattern: str,
    sparsity: float,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """Random data of a case on a device, its weight pruned by magnitude to the pattern."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = normal(*case.weight_shape)
    weight /= weight[0].numel() ** 0.5
    mask = parse(pattern).mask(weight.abs(), sparsity)
    x, bias = normal(*case.input_shape).to(dtype), normal(case.weight_shape[0]).to(dtype)
    grad = None
    if case.training:
        meta = [torch.empty(t.shape, device="meta") for t in (x, weight, bias)]
        grad = normal(*case.apply(*meta).shape).to(dtype)
    return Problem(case, pattern, sparsity, x, (weight * mask).to(dtype), bias, mask, grad)
