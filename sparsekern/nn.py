"""SparseLinear and SparseConv2d: drop-in layers whose weight is stored and multiplied sparse."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .graph_leaf import GraphLeaf, Proxy
from .onnx_export import refuse_export
from .patterns import NM, detect, parse
from .prune.targets import is_conv1d_of_transformers
from .weight_base import SparseWeight
from .weights import FORMATS, check_format

_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
ACTIVATIONS = ("none", "relu", "relu6", "gelu", "gelu_tanh")


def _random_weight(op, shape, groups, sparsity, pattern, format, device, dtype) -> SparseWeight:
    """A random pattern with nn.Linear's initial values, scaled to the fan-in that is left.

    Uniform in +-1 / sqrt(kept weights per output), so that activations keep the variance that a
    dense layer would give them (Evci et al. 2022, "Gradient Flow in Sparse Neural Networks").
    """
    pattern = parse(pattern)
    make = FORMATS[check_format(op, format, pattern, shape, groups)].from_dense
    if torch.device(device or torch.get_default_device()).type == "meta":
        return _meta_weight(make, shape, groups, pattern, sparsity, dtype)
    mask = pattern.mask(torch.rand(shape, device=device), sparsity)
    fan_in = max(1.0, mask.sum().item() / max(1, shape[0]))
    dense = torch.empty(shape, device=device, dtype=dtype)
    dense.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    return make(dense, mask, str(pattern), groups)


def _meta_weight(make, shape, groups, pattern, sparsity, dtype) -> SparseWeight:
    """Shapes without data; the exact count is that of the pattern on any scores."""
    scores = torch.zeros(shape, device="cpu")
    weight = make(scores.to(dtype), pattern.mask(scores, sparsity), str(pattern), groups)
    weight = weight.to("meta")
    weight.plan = weight.plan.new_empty(0)  # one of the indices to come will be made by loading
    return weight


class _SparseLayer(GraphLeaf):
    """What both layers share: bias, activation, autocast, training preparation."""

    weight: SparseWeight

    def _set_bias(self, bias: bool | Tensor | None, size: int, device, dtype) -> None:
        if isinstance(bias, Tensor):
            with torch.inference_mode(False):  # a parameter that can be trained later
                fresh = bias.detach().clone()
                self.bias = nn.Parameter(fresh, requires_grad=bias.requires_grad)
        elif bias:
            self.bias = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def _set_activation(self, op: str, activation: str) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{op}: expected activation to be one of {', '.join(ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        self.activation = activation

    def _init_bias(self) -> None:
        """As nn.Linear and nn.Conv2d: uniform in +-1 / sqrt(dense fan-in)."""
        fan_in = self.weight.shape[1:].numel()
        if self.bias is not None and fan_in and not self.bias.is_meta:
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero."""
        return self.weight.sparsity

    @property
    def pattern(self) -> str:
        """The pattern of the nonzeros."""
        return self.weight.pattern

    def _slow_forward(self, *args, **kwargs):
        """What nn.Module calls instead of `forward` while TorchScript traces."""
        refuse_export(type(self).__name__)
        return super()._slow_forward(*args, **kwargs)

    def prepare_training(self):
        """Make what the backward pass needs once, ahead of the first step; returns the layer."""
        self.weight.prepare_training()
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """The bias only where the weight can be loaded, too; the weight, a child, comes after."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        fault = self.weight.load_fault(state_dict, f"{prefix}weight.", assign)
        if fault:
            error_msgs.append(fault)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _autocast(self, x: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """Under autocast: input in the dtype of the weight, and the dtype the caller expects.

        The dtype of the weight decides what is computed in; under autocast the input may come in
        any floating dtype and the result goes out in autocast's, as from nn.Linear.
        """
        if not _is_any_autocast_enabled():
            return x, None
        kind = x.device.type  # asking costs more than all else here
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return x, None
        return x.to(self.weight.compute_dtype), torch.get_autocast_dtype(kind)


class SparseLinear(_SparseLayer):
    """`y = act(x W^T + b)` with a sparse W; leading arguments as nn.Linear.

    Args:
        in_features: Size of the last dimension of x.
        out_features: Size of the last dimension of y.
        bias: Whether to add b.
        sparsity: Share of zeros in [0, 1); the pattern is drawn at random. 2:4 and the like fix it.
        pattern: `unstructured`, `2:4`, `block:32x32`, ...; see `sparsekern.patterns.parse`.
        format: `csr`, `block` or `nm`; `auto` takes the one that suits the pattern.
        activation: Fused into the kernel: `none`, `relu`, `relu6`, `gelu` (erf) or `gelu_tanh`.
        device: As in nn.Linear.
        dtype: float32, bfloat16 or float64.

    Shapes: x `(..., in_features)` of any leading dimensions, y `(..., out_features)`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float | None = None,
        pattern="unstructured",
        format: str = "auto",
        activation: str = "none",
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"SparseLinear: expected {name} to be a positive integer, got {size}"
                )
        self.in_features, self.out_features = in_features, out_features
        self.transposed = False  # whether the dense twin is transformers' Conv1D
        self._set_activation("SparseLinear", activation)
        if sparsity is None and not isinstance(parse(pattern), NM):
            sparsity = 0.9
        shape = (out_features, in_features)
        self.weight = _random_weight(
            "SparseLinear", shape, 1, sparsity, pattern, format, device, dtype
        )
        self._set_bias(bias, out_features, device, dtype)
        self._init_bias()
        self.prepare_training()

    @classmethod
    def from_weight(cls, weight: SparseWeight, like: nn.Module, activation: str = "none"):
        """A layer around an existing weight, with a copy of the bias of the linear layer `like`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.transposed = is_conv1d_of_transformers(like)
        layer._set_activation("SparseLinear", activation)
        layer.weight = weight
        layer._set_bias(like.bias, weight.shape[0], None, None)
        return layer.train(like.training)

    @classmethod
    def from_dense(
        cls, linear: nn.Module, *, sparsity: float | None = None, pattern=None,
        format: str = "auto", activation: str = "none",
    ) -> "SparseLinear":  # fmt: skip
        """Sparse twin of a linear layer (or of transformers' Conv1D).

        Without `sparsity` and `pattern` it keeps exactly the zeros that are there; with them it
        prunes by magnitude first. `format` as in the constructor; without a pattern `auto` looks
        for one in the zeros. The dense layer is not changed.
        """
        transposed = is_conv1d_of_transformers(linear)  # GPT-2's layer stores (in, out)
        weight = linear.weight.detach().t() if transposed else linear.weight.detach()
        sparse = _sparsify("SparseLinear.from_dense", weight, sparsity, pattern, format, 1)
        sparse.values.requires_grad_(linear.weight.requires_grad)
        return cls.from_weight(sparse, linear, activation)

    def to_dense(self) -> nn.Module:
        """The dense twin, followed by the activation if one is fused.

        nn.Linear, or transformers' Conv1D where the layer was made from one.
        """
        weight = self.weight.to_dense().detach()
        if not self.transposed:
            linear = nn.Linear(self.in_features, self.out_features, device="meta")
            return _dense_twin(self, linear, weight)
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            linear = Conv1D(self.out_features, self.in_features)
        return _dense_twin(self, linear, weight.t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Y = act(x W^T + b)."""
        if isinstance(x, Proxy):
            return self.traced(x)
        x, dtype = self._autocast(x)
        y = self._modules["weight"].linear(x, self._parameters["bias"], self.activation)
        return y if dtype is None else y.to(dtype)

    def extra_repr(self) -> str:
        """Sizes, bias and activation."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )


class SparseConv2d(_SparseLayer):
    """2-d convolution with a sparse weight; leading arguments as nn.Conv2d.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Integer or pair.
        stride: Integer or pair.
        padding: Integer, pair, `valid` or `same`.
        dilation: Integer or pair.
        groups: Blocks of channels that do not see each other.
        bias: Whether to add a bias.
        padding_mode: `zeros`, `reflect`, `replicate` or `circular`.
        sparsity: Share of zeros in [0, 1); the pattern is drawn at random.
        pattern: See `sparsekern.patterns.parse`.
        format: `csr`, `block` or `nm`; `auto` takes the one that suits the pattern.
        activation: Fused: `none`, `relu`, `relu6`, `gelu` (erf) or `gelu_tanh`.
        device: As in nn.Conv2d.
        dtype: float32, bfloat16 or float64.

    Shapes: x `(n, in, h, w)` or `(in, h, w)`; y `(n, out, oh, ow)`, always contiguous.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        sparsity: float | None = None,
        pattern="unstructured",
        format: str = "auto",
        activation: str = "none",
        device=None,
        dtype=None,
    ):
        super().__init__()
        # nn.Conv2d checks its own arguments; on the meta device it allocates nothing.
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device="meta",
        )  # fmt: skip
        self._copy_geometry(twin)
        self._set_activation("SparseConv2d", activation)
        if sparsity is None and not isinstance(parse(pattern), NM):
            sparsity = 0.9
        shape = tuple(twin.weight.shape)
        self.weight = _random_weight(
            "SparseConv2d", shape, groups, sparsity, pattern, format, device, dtype
        )
        self._set_bias(bias, out_channels, device, dtype)
        self._init_bias()
        self.prepare_training()

    def _copy_geometry(self, conv: nn.Module) -> None:
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
            "groups", "padding_mode",
        ):  # fmt: skip
            setattr(self, name, getattr(conv, name))
        # (left, right, top, bottom), as F.pad takes it
        self._pads = tuple(conv._reversed_padding_repeated_twice)
        self._padding = _op_padding(self._pads)

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, *, sparsity: float | None = None, pattern=None,
        format: str = "auto", activation: str = "none",
    ) -> "SparseConv2d":  # fmt: skip
        """Sparse twin of a convolution; see `SparseLinear.from_dense`."""
        weight = _sparsify(
            "SparseConv2d.from_dense", conv.weight.detach(), sparsity, pattern, format, conv.groups
        )
        weight.values.requires_grad_(conv.weight.requires_grad)
        return cls.from_weight(weight, conv, activation)

    @classmethod
    def from_weight(cls, weight: SparseWeight, like: nn.Conv2d, activation: str = "none"):
        """A layer around an existing weight, geometry and a copy of the bias from `like`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._copy_geometry(like)
        layer._set_activation("SparseConv2d", activation)
        layer.weight = weight
        layer._set_bias(like.bias, like.out_channels, None, None)
        return layer.train(like.training)

    def to_dense(self) -> nn.Module:
        """The dense twin: nn.Conv2d, followed by the activation if one is fused."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding,
            self.dilation, self.groups, padding_mode=self.padding_mode, device="meta",
        )  # fmt: skip
        return _dense_twin(self, conv, self.weight.to_dense().detach())

    def forward(
        self, x: Tensor, residual: Tensor | None = None, activation: str | None = None,
        pads: tuple[int, int, int, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Y = act(conv2d(x, W) + b + residual).

        Args:
            x: `(n, in, h, w)` or `(in, h, w)`.
            residual: Of the shape of y; what a block of a residual network adds.
            activation: Instead of that of the layer.
            pads: Zeros around x before the padding of the layer, `(left, right, top, bottom)` as
                `torch.nn.functional.pad` takes them.
        """
        if isinstance(x, Proxy) or isinstance(residual, Proxy):
            return self.traced(x, residual, activation, pads)
        if x.dim() == 3:
            batch = None if residual is None else residual.unsqueeze(0)
            return self.forward(x.unsqueeze(0), batch, activation, pads).squeeze(0)
        if x.dim() == 4 and x.shape[1] != self.in_channels:
            raise RuntimeError(
                f"SparseConv2d: expected x with {self.in_channels} channels, got {x.shape[1]}"
            )
        x, dtype = self._autocast(x)
        padding = self._padding
        if self.padding_mode != "zeros":
            x = x if pads is None else nn.functional.pad(x, pads)
            x, padding = nn.functional.pad(x, self._pads, self.padding_mode), (0, 0)
        elif pads is not None:
            padding = _op_padding([a + b for a, b in zip(self._pads, pads, strict=True)])
        if residual is not None and residual.dtype != x.dtype:  # under autocast
            residual = residual.to(x.dtype)
        y = self.weight.conv2d(
            x, self.bias, _pair(self.stride), padding, _pair(self.dilation),
            self.activation if activation is None else activation, residual,
        )  # fmt: skip
        return y if dtype is None else y.to(dtype)

    def extra_repr(self) -> str:
        """Channels and geometry."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}, activation={self.activation}"
        )


def _op_padding(pads) -> tuple[int, ...]:
    """(left, right, top, bottom) as the ops take it: (top, left), and (bottom, right) if uneven."""
    left, right, top, bottom = pads
    return (top, left) if (top, left) == (bottom, right) else (top, left, bottom, right)


def _sparsify(op, weight, sparsity, pattern, format, groups) -> SparseWeight:
    if sparsity is None and pattern is None:
        found = parse("unstructured") if format == "csr" else detect(weight)
        make = FORMATS[check_format(op, format, found, weight.shape, groups)].from_dense
        return make(weight, None, str(found), groups)
    parsed = parse(pattern or "unstructured")
    if sparsity is None and not isinstance(parsed, NM):
        raise ValueError(f"{op}: expected sparsity= with pattern {parsed}, got none")
    make = FORMATS[check_format(op, format, parsed, weight.shape, groups)].from_dense
    return make(weight, parsed.mask(weight.abs().float(), sparsity), str(parsed), groups)


def _dense_twin(layer: _SparseLayer, dense: nn.Module, weight: Tensor) -> nn.Module:
    """Fill `dense`, made on the meta device, with `weight` and the bias of `layer`."""
    bias = layer.bias
    if bias is not None:
        weight = weight.to(bias.dtype)  # of int8 values it comes in float32
    dense.weight = nn.Parameter(weight, requires_grad=layer.weight.values.requires_grad)
    dense.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
    dense.train(layer.training)
    if layer.activation == "none":
        return dense
    if layer.activation in ("relu", "relu6"):
        return nn.Sequential(dense, nn.ReLU() if layer.activation == "relu" else nn.ReLU6())
    approximate = "tanh" if layer.activation == "gelu_tanh" else "none"
    return nn.Sequential(dense, nn.GELU(approximate))
