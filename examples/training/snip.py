"""The experiment that started this project: pruned before training, and trained from there.

    python examples/training/snip.py                       # resumes where it was stopped
    python examples/training/snip.py --seeds 0 --threads 2 --out timing.jsonl
    python examples/training/snip.py --seeds 0 --held-out 5000 --out choice.jsonl  # for choices

SNIP (Lee et al. 2019, arXiv:1810.02340) prunes a wide MLP and a CNN at their first weights to 90,
95 and 98 %, as single weights and in blocks of 16 x 16. Each is trained dense, masked, and
converted by `sk.convert_to_sparse(mode="training")`, all with the same first weights and the same
batches, step by step in turn, so that whatever slows the machine slows all of them. What was masked
is trained sparse again for each number of `--longer` epochs, which still takes less time than the
dense training. The learning rate is each side's own: pruning leaves smaller weights, which stand
(and without normalisation need) higher rates. `report.py` makes the page.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from lockstep import Side, accuracy, dense_side, masked_side, sparse_side
from wide import NETWORKS, fresh

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(EXAMPLES), str(EXAMPLES / "pruning")]
from data import DataError, Images, Split, load  # noqa: E402
from records import Records, RecordsError  # noqa: E402

RESULTS = EXAMPLES.parent / "docs" / "experiments" / "training.jsonl"
SETTINGS = (
    "sparsities", "patterns", "masked", "batch", "train", "epochs", "longer", "test", "width",
    "held_out", "lr", "pruned_lr", "block_lr", "warmup", "momentum", "threads",
)  # fmt: skip
# By network: width, images per batch, images to train on, epochs, epochs of the sparse twins of
# masked networks when they are trained once more and longer, learning rates dense, pruned
# as single weights, and pruned in other patterns (blocks at 0.8 diverge).
DEFAULTS = {
    "width": {"mlp": 2048, "cnn": 96},
    "batch": {"mlp": 512, "cnn": 32},
    "train": {"mlp": 30720, "cnn": 10240},
    "epochs": {"mlp": 5, "cnn": 2},
    "longer": {"mlp": (7, 10), "cnn": (3, 4)},
    "lr": {"mlp": 0.2, "cnn": 0.5},
    "pruned_lr": {"mlp": 0.8, "cnn": 0.5},
    "block_lr": {"mlp": 0.2, "cnn": 0.2},
}


def parser() -> argparse.ArgumentParser:
    """The command line; what differs by network is NAME=VALUE, `longer` several with commas."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    add("--dataset", default="fashion-mnist", help="fashion-mnist or mnist-5k")
    add("--data", type=Path, help="folder of Fashion-MNIST; default: $FASHION_MNIST, then Debian's")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    add("--patterns", nargs="+", default=["unstructured", "block:16x16"])
    add("--masked", nargs="*", default=["unstructured 0.95"], help="PATTERN SPARSITY to mask, too")
    for name, values in DEFAULTS.items():
        shown = " ".join(f"{k}={_text(v)}" for k, v in values.items())
        flag = f"--{name.replace('_', '-')}"
        add(flag, nargs="+", default=[], metavar="NETWORK=VALUE", help=f"default {shown}")
    add("--test", type=int, default=10000, help="images the accuracy is taken on")
    add("--held-out", type=int, default=0, help="last training images to take as the test")
    add("--warmup", type=float, default=0.2, help="share of the steps in which the rate rises")
    add("--momentum", type=float, default=0.9)
    add("--threads", type=int, default=1)
    add("--contest", type=float, default=2.0, help="seconds to find the fastest dense form")
    add("--out", type=Path, default=RESULTS)
    return made


def _text(value: float | tuple[int, ...]) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options, with a dict by network for those in DEFAULTS."""
    options = parser().parse_args(arguments)
    for name, values in DEFAULTS.items():
        given = dict(pair.split("=") for pair in getattr(options, name))
        number = float if name.endswith("lr") else _numbers if name == "longer" else int
        setattr(options, name, {**values, **{k: number(v) for k, v in given.items()}})
    return options


def run(options: argparse.Namespace, data: Images, network: str, seed: int) -> dict:
    """Train one network in all its forms; what each of them cost and how good it is."""
    single = {name: getattr(options, name)[network] for name in DEFAULTS}
    options = argparse.Namespace(**{**vars(options), **single})
    data = data.held_out(options.held_out) if options.held_out else data
    train, test = data.first(options.train).train, data.test[: options.test]
    sides, forms = _sides(options, train, network, seed)
    found = _train(sides, options, train, test, seed)
    for epochs in options.longer:
        extended = argparse.Namespace(**{**vars(options), "epochs": epochs})
        sides, _ = _sides(extended, train, network, seed, only=options.masked)
        trained = _train(sides, extended, train, test, seed)
        found |= {f"{name}, {epochs} epochs": cost for name, cost in trained.items()}
    return {"dense_forms_ms": forms, "sides": found}


def _train(sides: dict[str, Side], options, train: Split, test: Split, seed: int) -> dict:
    """Train the sides in turn, step by step; their accuracies and costs."""
    order = torch.Generator().manual_seed(seed)
    for epoch in range(options.epochs):
        for step, batch in enumerate(train.batches(options.batch, order)):
            names = list(sides) if step % 2 else reversed(sides)
            losses = {name: sides[name].timed_step(*batch) for name in names}
        shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        print(f"  epoch {epoch + 1}: loss {shown}", flush=True)
    found = {}
    for name, side in sides.items():
        score = accuracy(side, test.images, test.labels)
        found[name] = {"accuracy": score, "loss": losses[name], **side.costs(*batch)}
    return found


def _sides(
    options, train: Split, network: str, seed: int, only: Sequence[str] | None = None
) -> tuple[dict[str, Side], dict[str, float]]:
    """The networks by name, and the milliseconds of a step of each dense form.

    With `only`, the sparse networks of these names and no others.
    """
    options.steps = options.epochs * (len(train) // options.batch)
    model = fresh(network, options.width, seed)
    scoring = torch.Generator().manual_seed(1000 + seed)  # not the order of the training
    batch = next(iter(train.batches(options.batch, scoring)))
    sides: dict[str, Side] = {}
    forms: dict[str, float] = {}
    if only is None:
        sides["dense"], forms = dense_side(model, options, batch)
    for pattern in options.patterns:
        rate = options.pruned_lr if pattern == "unstructured" else options.block_lr
        pruned = argparse.Namespace(**{**vars(options), "lr": rate})
        for sparsity in options.sparsities:
            name = f"{pattern} {sparsity:g}"
            if only is None and name in options.masked:
                like = sides["dense"]
                sides[f"masked {name}"] = masked_side(like, pruned, pattern, sparsity, batch)
            if only is None or name in only:
                sides[f"sparse {name}"] = sparse_side(model, pruned, pattern, sparsity, batch)
    return sides, forms


def main(arguments: list[str] | None = None) -> int:
    """Run what has no record yet."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        data = load(options.dataset, options.data)
        records = Records(options.out)
        keys = [{"network": n, "seed": s} for n in options.networks for s in options.seeds]
        missing = records.missing(keys)
        if missing:
            settings = {name: getattr(options, name) for name in ("dataset", *SETTINGS)}
            records.start("training", settings)
        for key in missing:
            print(f"{key['network']}, seed {key['seed']}", flush=True)
            records.add(key, run(options, data, **key))
    except (DataError, RecordsError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(keys)} of {len(keys)} records in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
