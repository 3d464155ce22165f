"""Prune the encoder layer by layer and refit what is left, from a few unrated texts.

For each linear layer, in order, with inputs as the already pruned part of the model gives them:

1. `sparsekern.prune` with method `wanda` sets the weights that matter least to zero;
2. the surviving weights are refitted by least squares, so that the layer again produces what the
   dense model has at this place;
3. both are repeated a few times while the sparsity rises to its goal.

No gradient, no label and no rated text is involved. Refitting the survivors of one layer is the
idea of Optimal Brain Compression (Frantar & Alistarh 2022, arXiv:2208.11580) and of Boza 2024
(arXiv:2401.02938), from where the rising sparsity is; the scores are Wanda's (Sun et al. 2023,
arXiv:2306.11695). The target is the dense model's output, not what the dense layer would make of
the pruned inputs, and includes the residual connection, so that later layers repair earlier ones.
"""

import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.prune.regression import least_squares


@dataclass(frozen=True)
class Recipe:
    """Settings of the calibration.

    They were chosen by how well embeddings of held-out background texts keep their similarities,
    never by the rated texts.

    Attributes:
        sentences: Random sentences of the background texts.
        words: Random single words of the background texts.
        documents: Random whole background texts, cut at 128 tokens.
        steps: Times a layer is pruned and refitted on the way to its sparsity.
        iterations: Conjugate gradient iterations per step.
        ridge: Pull towards the dense weights, relative to the mean squared input.
        seed: Of the random choice of texts.
    """

    sentences: int = 140
    words: int = 1024
    documents: int = 25
    steps: int = 4
    iterations: int = 6
    ridge: float = 0.01
    seed: int = 0


def calibration_batches(tokenizer, background: Sequence[str], recipe: Recipe) -> list[dict]:
    """Token batches of sentences, words and documents, each batch of similar lengths."""
    draw = random.Random(recipe.seed)
    sentences = [s for text in background for s in re.split(r"(?<=[.!?])\s+", text) if len(s) > 20]
    words = sorted({w.lower() for text in background for w in re.findall(r"[A-Za-z]{3,}", text)})
    batches = []
    for texts, count, batch, length in (
        (sentences, recipe.sentences, 32, 64),
        (words, recipe.words, 256, 16),
        (background, recipe.documents, 8, 128),
    ):
        chosen = sorted(draw.sample(list(texts), min(count, len(texts))), key=len)
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            options = {"padding": True, "truncation": True, "max_length": length}
            batches.append(dict(tokenizer(part, **options, return_tensors="pt")))
    return batches


@dataclass
class _Stream:
    """One batch on its way through the dense and the pruned model, layer by layer.

    Attributes:
        dense, pruned: Hidden states `(batch, tokens, hidden)` in either model.
        attention: Attention mask `(batch, 1, tokens, tokens)`.
        kept: `(batch, tokens)`, False at padding.
        weight: `(kept tokens, 1)`.
    """

    dense: Tensor
    pruned: Tensor
    attention: Tensor
    kept: Tensor
    weight: Tensor

    @classmethod
    def start(cls, model: nn.Module, batch: dict) -> "_Stream":
        states, kept = model.embeddings(batch["input_ids"]), batch["attention_mask"].bool()
        lengths = kept.sum(1, keepdim=True).expand(kept.shape)[kept]
        # A token of a text with n tokens counts 1 / sqrt(n), between "every token counts alike"
        # and "every text counts alike"; its row is scaled by the square root of that.
        weight = lengths.float()[:, None] ** -0.25
        tokens = kept.shape[1]
        return cls(states, states, kept[:, None, None].expand(-1, -1, tokens, -1), kept, weight)

    def rows(self, states: Tensor) -> Tensor:
        """Weighted rows `(kept tokens, features)`."""
        return states[self.kept] * self.weight


@torch.no_grad()
def calibrate(
    dense: nn.Module, batches: list[dict], pattern: str, sparsity: float, recipe: Recipe
) -> nn.Module:
    """Pruned copy of a BERT model; its 6 linear layers per encoder layer are pruned.

    Args:
        dense: The dense `BertModel`, left as it is.
        batches: From `calibration_batches`.
        pattern: As `sparsekern.patterns.parse` takes it.
        sparsity: Share of zeros in each layer.
        recipe: Settings.
    """
    model = copy.deepcopy(dense)
    streams = [_Stream.start(dense, batch) for batch in batches]
    for layer, pruned in zip(dense.encoder.layer, model.encoder.layer, strict=True):
        _calibrate_layer(layer, pruned, streams, _Fit(pattern, sparsity, recipe))
    return model


def _calibrate_layer(dense, pruned, streams: list[_Stream], fit: "_Fit") -> None:
    """Prune the layer `pruned` in the order of its computation, and move the streams past it."""

    def both(part: str, *inputs: list) -> list[tuple[Tensor, Tensor]]:
        """Outputs of a part of both layers for pairs (dense, pruned) of inputs."""
        modules = dense.get_submodule(part), pruned.get_submodule(part)
        return [
            tuple(module(*side) for module, side in zip(modules, zip(*pairs)))
            for pairs in zip(*inputs)
        ]

    def linears(*names: str) -> list[tuple[nn.Linear, nn.Linear]]:
        return [(dense.get_submodule(name), pruned.get_submodule(name)) for name in names]

    states = [(s.dense, s.pruned) for s in streams]
    fit(streams, linears(*(f"attention.self.{n}" for n in ("query", "key", "value"))), states)
    masks = [(s.attention, s.attention) for s in streams]
    mixed = [(a[0], b[0]) for a, b in both("attention.self", states, masks)]
    fit(streams, linears("attention.output.dense"), mixed, states)
    attended = both("attention.output", mixed, states)
    fit(streams, linears("intermediate.dense"), attended)
    wide = both("intermediate", attended)
    fit(streams, linears("output.dense"), wide, attended)
    for stream, (a, b) in zip(streams, both("output", wide, attended)):
        stream.dense, stream.pruned = a, b


@dataclass(frozen=True)
class _Fit:
    """Prunes and refits linear layers that share their input."""

    pattern: str
    sparsity: float
    recipe: Recipe

    def __call__(self, streams, linears, inputs, residuals=None) -> None:
        """Prune and refit.

        Args:
            streams: The batches.
            linears: Pairs (dense layer, layer to prune).
            inputs: Per stream the (dense, pruned) input of the layers.
            residuals: Per stream the (dense, pruned) tensor added to the output, if any.
        """
        features = inputs[0][0].shape[-1]
        gram = torch.zeros(features, features)
        cross = [torch.zeros(layer.out_features, features) for layer, _ in linears]
        for index, (stream, (x_dense, x_pruned)) in enumerate(zip(streams, inputs)):
            x, reference = stream.rows(x_pruned), stream.rows(x_dense)
            gram += x.T @ x
            for total, (layer, _) in zip(cross, linears):
                wanted = reference @ layer.weight.T
                if residuals:
                    wanted += stream.rows(residuals[index][0] - residuals[index][1])
                total += wanted.T @ x
        for total, (layer, pruned) in zip(cross, linears):
            self._prune_and_refit(layer.weight, pruned, gram, total)

    def _prune_and_refit(self, dense: Tensor, pruned: nn.Linear, gram, cross) -> None:
        # Wanda needs the norm of each input feature; one token with these values has the same.
        norms = gram.diagonal().clamp_min(0).sqrt()[None]
        fixed = isinstance(sk.patterns.parse(self.pattern), sk.patterns.NM)
        for step in range(1, 2 if fixed else self.recipe.steps + 1):
            share = 1.0 if fixed else step / self.recipe.steps
            sk.prune(
                pruned,
                method="wanda",
                pattern=self.pattern,
                sparsity=1 - (1 - self.sparsity) ** share,
                data=[norms],
            )
            iterations = self.recipe.iterations * (2 if fixed else 1)
            goal = dense, gram, cross, self.recipe.ridge, iterations
            pruned.weight.copy_(least_squares(pruned.weight, pruned.weight != 0, *goal))
