"""The two networks of the experiment, and the forms in which torch runs them dense."""

import copy

import torch
from torch import Tensor, nn

PIXELS, CLASSES = 28, 10


def mlp(width: int = 2048) -> nn.Sequential:
    """784 - width - width - 10 with ReLU, for images `(N, 1, 28, 28)`."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(PIXELS * PIXELS, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def cnn(width: int = 64) -> nn.Sequential:
    """Convolutions 3x3 of width, 2 width and 4 width channels, for images `(N, 1, 28, 28)`.

    Each with batch normalisation and ReLU. The first has stride 2 and a max pool behind it; the map
    of the last is averaged.
    """
    return nn.Sequential(
        *_block(1, width, stride=2),
        nn.MaxPool2d(2),
        *_block(width, 2 * width),
        *_block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


def _block(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


NETWORKS = {"mlp": mlp, "cnn": cnn}


def fresh(network: str, width: int, seed: int) -> nn.Module:
    """The untrained network of a seed.

    Weights are normal with variance 2 / fan-in (He et al. 2015): SNIP asks for a variance that
    scales.
    """
    torch.manual_seed(seed)
    model = NETWORKS[network](width)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class _Products(torch.autograd.Function):
    """A linear layer whose three products oneDNN computes; torch takes MKL, slower on AMD."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, _product(grad.t(), x.t()), grad.sum(0)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(nn.Linear):
    """nn.Linear by way of oneDNN, with both gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear, for x `(N, in)`."""
        return _Products.apply(x, self.weight, self.bias)


def dense_forms(model: nn.Module) -> dict[str, nn.Module]:
    """Copies of a dense model that differ in nothing but speed, by name."""
    last, products = copy.deepcopy(model), copy.deepcopy(model)
    for module in products.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
    forms = {"plain": copy.deepcopy(model)}
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        forms["channels_last"] = last.to(memory_format=torch.channels_last)
    else:
        forms["oneDNN products"] = products
    return forms
