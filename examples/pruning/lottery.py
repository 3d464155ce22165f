"""Lottery tickets: masks found by training, and what the first weights are worth behind them.

    python examples/pruning/lottery.py

Frankle & Carbin 2019 (arXiv:1803.03635): train, prune the smallest weights of every layer, put the
others back to their first values, repeat. At some sparsities on the way the same masks are trained
from newly drawn weights, and masks drawn at random (as many weights in every layer) from the first
weights. Also with rewinding to a later epoch (arXiv:1903.01611, arXiv:1912.05671), and with the
learning rate alone put back (Renda et al. 2020, arXiv:2003.02389).
"""

import argparse
from collections.abc import Iterator

from frame import Bench, Experiment, Training, accuracy, run

import sparsekern as sk

NETWORK, OUTPUT = "LeNet-300-100", "fc3"
ROUNDS = 8
RATE = 1 - 10**-0.2  # share of what is left that goes in every round: 37 %
FINAL = 1 - (1 - RATE) ** ROUNDS
COMPARED = (2, 5, 8)  # rounds after which the controls are trained
CONTROLS = {"new weights": "reinit", "random mask": "random_mask"}
RATE_ALONE = "rate"  # in place of an epoch: weights stay as they are


class Lottery:
    """Iterative magnitude pruning with rewinding, on one network."""

    def __init__(self, bench: Bench, rewind: int | str, seed: int):
        """Train to the epoch that tickets go back to."""
        self.weights = rewind != RATE_ALONE
        self.model, self.test, self.seed = bench.fresh(NETWORK, seed), bench.data.test, seed
        self.training = Training(self.model, bench.data, bench.options, bench.options.epochs, seed)
        # The pruner is told of one step in every round, the last, and prunes after each.
        self.pruner = sk.Pruner(
            self.model,
            self.training.optimizer,
            "magnitude",
            FINAL,
            scope={OUTPUT: 1 - (1 - RATE / 2) ** ROUNDS},  # half the rate, as in the paper
            schedule=sk.schedules.Iterative(FINAL, ROUNDS, every=1),
        )
        warm_up = self.training.epochs()
        for _ in range(rewind if self.weights else 0):
            next(warm_up)
        training = self.training
        self.ticket = sk.LotteryTicket(self.pruner, training.scheduler, training.generator)

    def points(self) -> Iterator[dict]:
        """Yield results as sparsity rises: tickets, and controls where they are compared."""
        for number in range(ROUNDS + 1):
            masks = {name: mask.clone() for name, mask in self.pruner.masks.items()}
            for line, control in CONTROLS.items() if self.weights and number in COMPARED else ():
                # Not the seed of the first weights, or the new ones would be the same.
                self.ticket.rewind(control=control, seed=1000 + self.seed)
                yield self._train(line)
                self.pruner.set_masks(masks)
            self.ticket.rewind(weights=self.weights)
            yield self._train("ticket")
            self.pruner.step()

    def _train(self, line: str) -> dict:
        curve = [accuracy(self.model, self.test) for _ in self.training.epochs()]
        kept, total = (
            sum(int(count(mask)) for mask in self.pruner.masks.values())
            for count in (lambda mask: mask.sum(), lambda mask: mask.numel())
        )
        sparsity = 1 - kept / total
        return {"line": line, "sparsity": sparsity, "accuracy": curve[-1], "curve": curve}


def keys(options: argparse.Namespace) -> list[dict]:
    """One record for every epoch that is rewound to, and every seed."""
    last = options.epochs - 1
    epochs = dict.fromkeys(min(epoch, last) for epoch in (0, 1))
    places = [*epochs, RATE_ALONE]
    return [{"rewind": place, "seed": seed} for place in places for seed in options.seeds]


def run_one(bench: Bench, key: dict) -> dict:
    """All rounds of one network."""
    return {"points": list(Lottery(bench, key["rewind"], key["seed"]).points())}


EXPERIMENT = Experiment("lottery", keys, run_one, defaults={})

if __name__ == "__main__":
    run(EXPERIMENT, __doc__)
