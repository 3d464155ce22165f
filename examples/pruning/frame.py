"""What all experiments share: data, training, the loop over seeds, and the command line.

Every network is trained with SGD and momentum; the learning rate falls from its start to 0 along a
cosine over all steps. A seed decides the first weights and the order of the data, and with them
everything else, so that methods meet equal networks and a record can be computed again.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from networks import NETWORKS
from records import Records, RecordsError
from torch import nn
from torch.nn import functional as F

import sparsekern as sk

sys.path.append(str(Path(__file__).resolve().parents[1]))
from data import DataError, Images, Split, load

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "experiments"
SIZES = ("train", "epochs", "tune", "batch", "scoring", "threads")
SETTINGS = (*SIZES[:-1], "hold", "dataset", "lr", "momentum", "decay")  # results depend on them


class Training:
    """A model in training, with all that a rewind must take back.

    Attributes:
        model: The model.
        optimizer: SGD.
        scheduler: Cosine over `steps`.
        generator: Decides the order of the data.
        steps: Steps in all.
    """

    def __init__(self, model: nn.Module, data: Images, options, epochs: int, seed: int):
        self.model, self.data, self.batch = model, data, options.batch
        self.steps = epochs * (len(data.train) // options.batch)
        self.optimizer = torch.optim.SGD(
            model.parameters(), options.lr, options.momentum, weight_decay=options.decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: (1 + math.cos(math.pi * min(step / self.steps, 1))) / 2
        )
        self.generator = torch.Generator().manual_seed(seed)

    def epochs(
        self, pruner: sk.Pruner | None = None, penalty: Callable | None = None
    ) -> Iterator[None]:
        """Train until the steps are used up, and yield after every epoch.

        Args:
            pruner: Its `step` is called after every step.
            penalty: From the model to a term of the loss.
        """
        while self.scheduler.last_epoch < self.steps:
            self.model.train()
            for images, labels in self.data.train.batches(self.batch, self.generator):
                loss = F.cross_entropy(self.model(images), labels)
                if penalty is not None:
                    loss = loss + penalty(self.model)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.scheduler.step()
                if pruner is not None:
                    pruner.step()
            yield


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split, batch: int = 1000) -> float:
    """Share of images whose class the model finds, in percent."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in split.batches(batch))
    return 100 * right / len(split)


@torch.inference_mode()
def conversion_error(model: nn.Module, split: Split) -> float:
    """Largest difference of the converted model's outputs, relative to the largest output."""
    images, model = split.images[:64], model.eval()
    wanted = model(images)
    got = sk.convert_to_sparse(copy.deepcopy(model), progress=False)(images)
    return float((got - wanted).abs().max() / wanted.abs().max())


class Bench:
    """Data, options, and the dense networks that several runs start from.

    Attributes:
        options: From the command line.
        data: Training and test images.
        held_out: Training images that are not trained on, for choices; empty unless asked for.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        found = load(options.dataset, options.data).first(options.train)
        self.data = found.first(len(found.train) - options.hold)
        self.held_out = found.held_out(options.hold).test if options.hold else found.train[:0]
        self._dense: dict[tuple, nn.Module] = {}

    def fresh(self, network: str, seed: int) -> nn.Module:
        """The untrained network of a seed."""
        torch.manual_seed(seed)
        return NETWORKS[network]()

    def dense(self, network: str, seed: int, penalty: Callable | None = None) -> nn.Module:
        """A copy of the trained dense network of a seed."""
        key = (network, seed, penalty)
        if key not in self._dense:
            model = self.fresh(network, seed)
            training = Training(model, self.data, self.options, self.options.epochs, seed)
            for _ in training.epochs(penalty=penalty):
                pass
            self._dense[key] = model
        return copy.deepcopy(self._dense[key])

    def scoring(self, seed: int, size: int = 100) -> list[tuple]:
        """Batches of training images for methods that look at data, drawn by the seed."""
        generator = torch.Generator().manual_seed(1000 + seed)
        count = min(self.options.scoring, len(self.data.train))
        chosen = torch.randperm(len(self.data.train), generator=generator)[:count]
        return list(self.data.train[chosen].batches(min(size, count)))


@dataclass(frozen=True)
class Experiment:
    """An experiment: what there is to run, and how one of it runs.

    Attributes:
        name: Of its files.
        keys: From the options to the keys of all records, plain dicts.
        run: From bench and key to the record's values.
        defaults: Options whose defaults differ from those of `parser`.
    """

    name: str
    keys: Callable[[argparse.Namespace], Sequence[dict]]
    run: Callable[[Bench, dict], dict]
    defaults: dict


def parser(experiment: Experiment, doc: str) -> argparse.ArgumentParser:
    """The command line of an experiment."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    add = made.add_argument
    add("--dataset", default="fashion-mnist", help="fashion-mnist or mnist-5k")
    add("--data", type=Path, help="folder of Fashion-MNIST; default: $FASHION_MNIST, then Debian's")
    add("--train", type=int, default=5000, help="training images")
    add("--epochs", type=int, default=4, help="epochs of the dense network before pruning")
    add("--tune", type=int, default=2, help="epochs after; pruned from the start: both together")
    add("--batch", type=int, default=100, help="images per step")
    add("--lr", type=float, default=0.05, help="learning rate at the start")
    add("--momentum", type=float, default=0.9)
    add("--decay", type=float, default=5e-4, help="weight decay")
    add("--scoring", type=int, default=1000, help="images that data-driven methods look at")
    add("--hold", type=int, default=0, help="of the training images, held out for choices")
    add("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--threads", type=int, default=1, help="CPU threads")
    add("--only", help="run only keys that hold this text")
    add("--out", type=Path, default=RESULTS / f"{experiment.name}.jsonl", help="results")
    made.set_defaults(**experiment.defaults)
    return made


def parse(experiment: Experiment, doc: str, arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; a bad value ends the program with a message."""
    made = parser(experiment, doc)
    options = made.parse_args(arguments)
    for name in SIZES:
        if getattr(options, name) < 1:
            made.error(f"expected --{name} of at least 1, got {getattr(options, name)}")
    for sparsity in options.sparsities:
        if not 0 < sparsity < 1:
            made.error(f"expected --sparsities in (0, 1), got {sparsity}")
    if options.hold < 0 or options.train - options.hold < options.batch:
        got = f"{options.train}, {options.hold} and {options.batch}"
        made.error(f"expected --train less --hold to make a --batch, got {got}")
    return options


def main(experiment: Experiment, doc: str, arguments: list[str] | None = None) -> Records:
    """Run what has no record yet; returns all records."""
    options = parse(experiment, doc, arguments)
    torch.set_num_threads(options.threads)
    bench, records = Bench(options), Records(options.out)
    keys = [k for k in experiment.keys(options) if not options.only or options.only in str(k)]
    missing = records.missing(keys)
    if missing:
        settings = {name: getattr(options, name) for name in SETTINGS}
        records.start(experiment.name, settings)
    for number, key in enumerate(missing, 1):
        start = time.perf_counter()
        values = experiment.run(bench, key)
        records.add(key, {**values, "seconds": time.perf_counter() - start})
        name = ", ".join(str(value) for value in key.values())
        shown = values.get("accuracy", "")
        print(f"{number}/{len(missing)} {name}: {shown}", file=sys.stderr, flush=True)
    return records


def run(experiment: Experiment, doc: str) -> None:
    """The program of an experiment."""
    try:
        records = main(experiment, doc)
    except (DataError, RecordsError, OSError) as error:
        sys.exit(f"{experiment.name}: {error}")
    print(
        f"{len(records.done)} results in {records.path}; python examples/pruning/page.py shows them"
    )
