"""The networks of the experiments, for images of 28 x 28 and 10 classes."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

HIDDEN = (300, 100)
PIXELS, CLASSES = 28 * 28, 10


def lenet_300_100(hidden: tuple[int, int] = HIDDEN, norm: bool = False) -> nn.Sequential:
    """LeNet-300-100 (LeCun et al. 1998): fc1, fc2, fc3 with ReLU; with BatchNorm if asked."""
    first, second = hidden
    layers: list[tuple[str, nn.Module]] = [("flat", nn.Flatten())]
    for i, (inputs, outputs) in enumerate(((PIXELS, first), (first, second)), 1):
        layers += [(f"fc{i}", nn.Linear(inputs, outputs))]
        layers += [(f"norm{i}", nn.BatchNorm1d(outputs))] if norm else []
        layers += [(f"relu{i}", nn.ReLU())]
    return nn.Sequential(OrderedDict([*layers, ("fc3", nn.Linear(second, CLASSES))]))


def lenet_5() -> nn.Sequential:
    """LeNet-5 as pruning papers take it (Caffe's): 20 and 50 filters of 5 x 5, 500 units."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flat=nn.Flatten(),
            fc1=nn.Linear(50 * 4 * 4, 500),
            relu3=nn.ReLU(),
            fc2=nn.Linear(500, CLASSES),
        )
    )


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm and a shortcut, 1 x 1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def resnet_8(width: int = 16) -> nn.Sequential:
    """A residual network of 8 layers (He et al. 2016, section 4.2, n = 1), its stem of stride 2."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, width, 3, 2, 1, bias=False),
            norm=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
            block1=Residual(width, width, 1),
            block2=Residual(width, 2 * width, 2),
            block3=Residual(2 * width, 4 * width, 2),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(4 * width, CLASSES),
        )
    )


NETWORKS = {
    "LeNet-300-100": lenet_300_100,
    "LeNet-300-100, BatchNorm": lambda: lenet_300_100(norm=True),
    "LeNet-5": lenet_5,
    "ResNet-8": resnet_8,
}


def small_hidden(sparsity: float) -> tuple[int, int]:
    """Hidden units of the widest LeNet-300-100 with at most `1 - sparsity` of the weights."""
    budget = (1 - sparsity) * _weights(HIDDEN)
    fitting = [h for h in map(_hidden, range(1, HIDDEN[0] + 1)) if _weights(h) <= budget]
    return fitting[-1] if fitting else _hidden(1)


def _hidden(first: int) -> tuple[int, int]:
    return first, max(1, round(first * HIDDEN[1] / HIDDEN[0]))


def _weights(hidden: tuple[int, int]) -> int:
    return PIXELS * hidden[0] + hidden[0] * hidden[1] + hidden[1] * CLASSES
