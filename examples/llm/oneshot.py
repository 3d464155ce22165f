"""Wanda against SparseGPT against magnitude: half of the weights gone, and no training after it.

    python examples/llm/oneshot.py                        # resumes where it was stopped
    python examples/llm/oneshot.py --models lm --steps 300

Wanda (Sun et al. 2023, arXiv:2306.11695) and SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774)
see a few calibration sequences, drawn anew for each seed; magnitude sees none. All prune the linear
layers between embedding and head, every layer to 50 %, as single weights and as 2:4. Models: a
small Llama trained here on Shakespeare's texts (perplexity per byte on texts held out) and
all-MiniLM-L6-v2 (correlation with human ratings, see examples/minilm).
"""

import argparse
import copy
import functools
import random
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import lm
import torch
from torch import nn

import sparsekern as sk

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(EXAMPLES / "minilm"), str(EXAMPLES / "pruning")]
import evaluate  # noqa: E402
from records import Records, RecordsError  # noqa: E402

RESULTS = EXAMPLES.parent / "docs" / "experiments" / "oneshot.jsonl"
TRAINED = EXAMPLES.parent / "reports"
METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = ("unstructured", "2:4")
SPARSITY = 0.5


class Llama:
    """The small Llama: how it is calibrated and how good it is."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.text, self.held_out = lm.load_texts(options.texts)
        self.dense = lm.trained(options.recipe, self.text, options.trained)
        self.ignore = ("lm_head",)

    def calibration(self, seed: int) -> list[torch.Tensor]:
        """Batches of stretches of the training texts."""
        generator = torch.Generator().manual_seed(1000 + seed)
        drawn = lm.windows(self.text, self.options.recipe.context, self.options.samples, generator)
        return list(drawn.split(32))

    def quality(self, model: nn.Module) -> dict[str, float]:
        """Perplexity on the texts held out; less is better."""
        context = self.options.recipe.context
        found = lm.perplexity(model, self.held_out, context, self.options.windows)
        return {"perplexity": found}


class MiniLM:
    """all-MiniLM-L6-v2: how it is calibrated and how good it is."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        evaluate.require_packages()
        self.dense, self.tokenizer = evaluate.load_model()
        texts = evaluate.load_texts()
        self.texts = replace(texts, pairs=texts.pairs[: options.pairs])
        self.ignore = ()

    def calibration(self, seed: int) -> list[dict]:
        """Batches of sentences from news items without ratings."""
        background = " ".join(self.texts.background)
        sentences = [s for s in re.split(r"(?<=[.!?])\s+", background) if len(s) > 20]
        drawn = random.Random(seed).sample(sentences, min(self.options.samples, len(sentences)))
        drawn.sort(key=len)
        options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
        parts = (drawn[start : start + 32] for start in range(0, len(drawn), 32))
        return [dict(self.tokenizer(part, **options)) for part in parts]

    def quality(self, model: nn.Module) -> dict[str, float]:
        """Correlations with the ratings; more is better."""
        found = evaluate.accuracy(model, self.tokenizer, self.texts)
        return {"wordsim": found.wordsim, "lee": found.lee}


MODELS = {"lm": Llama, "minilm": MiniLM}


def keys(options: argparse.Namespace) -> list[dict]:
    """One record for every draw; dense and magnitude use none."""
    found = []
    for model in options.models:
        found.append({"model": model, "method": "dense"})
        for method in options.methods:
            for pattern in options.patterns:
                seeds = [None] if method == "magnitude" else options.seeds
                key = {"model": model, "method": method, "pattern": pattern}
                found += [key if s is None else {**key, "seed": s} for s in seeds]
    return found


def run(subject: Llama | MiniLM, key: dict) -> dict:
    """Prune a copy of the model and see how good it is."""
    model, start = copy.deepcopy(subject.dense), time.perf_counter()
    if key["method"] == "dense":
        return subject.quality(model)
    report = sk.prune(
        model,
        key["method"],
        SPARSITY,
        key["pattern"],
        scope="uniform",
        data=subject.calibration(key["seed"]) if "seed" in key else None,
        ignore=subject.ignore,
    )
    seconds = time.perf_counter() - start
    return {"sparsity": report.sparsity, "prune_s": seconds, **subject.quality(model)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; those of the small Llama's recipe become `recipe`."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--patterns", nargs="+", default=list(PATTERNS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of calibration data")
    add("--samples", type=int, default=64, help="calibration sequences")
    add("--windows", type=int, default=256, help="windows the perplexity is taken on")
    add("--pairs", type=int, help="word pairs of WordSim-353 (default: all)")
    add("--texts", type=Path, help="folder of .txt files; default: the package shakespeare")
    add("--trained", type=Path, default=TRAINED, help="folder that keeps the trained Llama")
    for name, value in asdict(lm.Recipe()).items():
        if name != "bf16":
            add(f"--{name}", type=type(value), default=value, help=f"Llama: default {value}")
    add("--float32", action="store_true", help="Llama: train without bfloat16")
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=RESULTS)
    options = made.parse_args(arguments)
    fields = {name: getattr(options, name, None) for name in asdict(lm.Recipe())}
    options.recipe = lm.Recipe(**{**fields, "bf16": not options.float32})
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run what has no record yet."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    subjects = {name: functools.cache(lambda n=name: MODELS[n](options)) for name in MODELS}
    try:
        records = Records(options.out)
        missing = records.missing(keys(options))
        if missing:
            named = ("samples", "windows", "pairs")
            settings = {name: getattr(options, name) for name in named}
            records.start("oneshot", {**settings, "recipe": asdict(options.recipe)})
        for key in missing:
            values = run(subjects[key["model"]](), key)
            records.add(key, values)
            print(", ".join(map(str, key.values())), values, flush=True)
    except (lm.TextError, RecordsError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(keys(options))} records in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
