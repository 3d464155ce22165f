"""ResNet-50 dense against sparse, one image: `python bench/resnet50.py --threads 1`.

Random weights, magnitude-pruned uniformly; BatchNorm folded on every side but the first. All sides
take turns. Appends one JSON line to --out.
"""

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import sparsekern as sk
from sparsekern.measure import hardware, interleaved


def sides(sparsity: float, image: torch.Tensor) -> tuple[dict, sk.ConversionReport]:
    """Name -> callable, and what the conversion did."""
    torch.manual_seed(0)
    plain = ResNetForImageClassification(ResNetConfig()).eval()
    folded = copy.deepcopy(plain)
    sk.prune(folded, method="magnitude", sparsity=sparsity, scope="uniform")
    sk.fold_batchnorm(folded, image)
    last = copy.deepcopy(folded).to(memory_format=torch.channels_last)
    sparse = sk.convert_to_sparse(copy.deepcopy(folded), image, cache=False)
    image_last = image.to(memory_format=torch.channels_last)
    torch.testing.assert_close(sparse(image).logits, folded(image).logits, rtol=1e-3, atol=1e-3)
    calls = {
        "dense": lambda: plain(image),
        "dense folded": lambda: folded(image),
        "dense folded channels_last": lambda: last(image_last),
        "sparse": lambda: sparse(image),
    }
    return calls, sk.report(sparse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of timing per sparsity")
    parser.add_argument("--out", type=Path, default=Path("bench/results/resnet50.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for sparsity in options.sparsity:
        with torch.inference_mode():
            calls, report = sides(sparsity, image)
            times = dict(zip(calls, interleaved(list(calls.values()), options.budget)))
        for name, timing in times.items():
            print(f"{sparsity:.0%}  {name:28} {timing.median_ms:7.2f} ms")
        point = {"sparsity": sparsity, "threads": options.threads, "layers": report.summary()}
        point["sides"] = {
            name: {k: v for k, v in asdict(t).items() if k != "samples_ms"}
            for name, t in times.items()
        }
        with options.out.open("a") as file:
            file.write(json.dumps({**point, "hardware": hardware()}) + "\n")


if __name__ == "__main__":
    main()
