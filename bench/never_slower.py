"""Whether conversion ever makes a model slower: random models, in the three ways of calling them.

    python bench/never_slower.py --out bench/results/never_slower.jsonl

Each model is pruned, converted with its example inputs, and timed against the dense copy under
inference_mode, under no_grad and plainly, with gradients on: interleaved, the median of the ratios
of neighbouring samples. One JSON line per model, at the end one with the worst ratios. Run it on a
quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import sparsekern as sk
from sparsekern.measure.hardware import commit, hardware
from sparsekern.measure.timer import interleaved, speedup
from sparsekern.tune import WAYS, called

GOAL = 0.95  # dense / converted; below it a model became slower
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh)


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self, width: int, heads: int, act: type[nn.Module]):
        super().__init__()
        self.heads = heads
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = act()

    def forward(self, x):
        """Attention and MLP for x `(batch, tokens, width)`."""
        q, k, v = self.qkv(self.norm_a(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(self.act(self.up(self.norm_b(x))))


class Residual(nn.Module):
    """A residual block of convolutions."""

    def __init__(self, width: int, act: type[nn.Module], kernel: int):
        super().__init__()
        self.a = nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_a, self.norm_b, self.act = nn.BatchNorm2d(width), nn.BatchNorm2d(width), act()

    def forward(self, x):
        """Two convolutions and the sum, for x `(n, width, h, w)`."""
        return self.act(self.norm_b(self.b(self.act(self.norm_a(self.a(x))))) + x)


def draw(rng: random.Random) -> tuple[dict, nn.Module, torch.Tensor]:
    """A random model in eval mode with an input, and what it is."""
    kind = rng.choice(("mlp", "conv", "transformer"))
    act, depth = rng.choice(ACTIVATIONS), rng.randint(1, 6)
    width = 2 ** rng.randint(4, {"mlp": 10, "conv": 8, "transformer": 9}[kind])
    batch = 2 ** rng.randint(0, {"mlp": 8, "conv": 4, "transformer": 3}[kind])
    if kind == "mlp":
        widths = [width, *(2 ** rng.randint(4, 10) for _ in range(depth))]
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), act())]
        model, x = nn.Sequential(*layers[:-1]), torch.randn(batch, width)
    elif kind == "conv":
        size = 2 ** rng.randint(3, 5)
        blocks = [Residual(width, act, rng.choice((1, 3))) for _ in range(depth)]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
        model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.MaxPool2d(2), *blocks, *head)
        x = torch.randn(batch, 3, size, size)
    else:
        tokens = 2 ** rng.randint(0, 7)
        model = nn.Sequential(*(Block(width, max(1, width // 64), act) for _ in range(depth)))
        x = torch.randn(batch, tokens, width)
    pattern = rng.choice(("unstructured",) * 3 + ("2:4", "block:4x4"))
    sparsity = 0.5 if pattern == "2:4" else round(rng.uniform(0.5, 0.99), 2)
    what = {
        "kind": kind, "width": width, "depth": depth, "act": act.__name__, "input": list(x.shape),
        "pattern": pattern, "sparsity": sparsity,
    }  # fmt: skip
    return what, model.eval(), x


def prune(model: nn.Module, what: dict) -> None:
    """Zeros in the weights that the pattern fits."""
    for layer in (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))):
        fits = all(size % 4 == 0 for size in layer.weight.shape[:2])
        pattern = what["pattern"] if fits else "unstructured"
        options = {} if pattern == "2:4" else {"sparsity": what["sparsity"]}
        sk.prune(layer, method="magnitude", pattern=pattern, scope="uniform", **options)


def ratios(dense: nn.Module, converted: nn.Module, x, budget_s: float) -> dict[str, float]:
    """How many times faster the converted model is, in each way of calling."""
    found = {}
    for way in WAYS:
        with called(way):
            sides = [lambda: dense(x), lambda: converted(x)]
            found[way] = speedup(*interleaved(sides, budget_s=budget_s, min_rounds=21)).median
    return found


def measure(index: int, seed: int, budget_s: float) -> dict:
    """Draw, prune, convert and time one model."""
    torch.manual_seed(seed * 10_000 + index)
    what, dense, x = draw(random.Random(seed * 10_000 + index))
    prune(dense, what)
    converted = sk.convert_to_sparse(copy.deepcopy(dense), x, cache=False, progress=False)
    report = sk.report(converted)
    row = {"index": index, **what, "sparse_layers": report.n_sparse, "decided": report.model_gains}
    row["reverted"] = report.reverted
    # A model without sparse layers is the dense one: nothing to time.
    row["ratios"] = ratios(dense, converted, x, budget_s) if report.n_sparse else {}
    return row


def main() -> None:
    """Measure and write; the exit status tells whether all models are above the goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="index of the first model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per model and way")
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    worst: dict[str, float] = {}
    with arguments.out.open("w") as file:
        head = {"hardware": hardware(), "commit": commit(Path(__file__).parent), "goal": GOAL}
        file.write(json.dumps(head) + "\n")
        for index in range(arguments.first, arguments.first + arguments.models):
            row = measure(index, arguments.seed, arguments.budget)
            for way, ratio in row["ratios"].items():
                worst[way] = min(ratio, worst.get(way, ratio))
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(index, row["kind"], row["input"], row["sparse_layers"], row["ratios"])
        file.write(json.dumps({"worst": worst}) + "\n")
    print("worst", worst)
    raise SystemExit(any(ratio < GOAL for ratio in worst.values()))


if __name__ == "__main__":
    main()
