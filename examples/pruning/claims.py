"""What the papers lead one to expect, checked on the results."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from results import Point


@dataclass(frozen=True)
class Claim:
    """One line of a figure should lie above another.

    Attributes:
        region: Of the page.
        text: The claim.
        source: Who claims it.
        better: Line that should be better.
        worse: Line that should be worse.
        metric: `"accuracy"`, `"pruned"` for that before any training after pruning, or `"rise"` of
            the loss, of which less is better.
    """

    region: str
    text: str
    source: str
    better: str
    worse: str
    metric: str = "accuracy"


EQUAL, FIXED = "magnitude, layer by layer", "random at start, uniform"
SHUFFLED = "SNIP's share of every layer, at random"
BEFORE = "loses less before retraining"
FRANKLE, EVCI = "Frankle & Carbin 2019", "Evci et al. 2020"
CLAIMS = (
    Claim("accuracy", "magnitude beats random", "all", EQUAL, "random after training"),
    Claim("accuracy", "one ranking beats equal shares", "Blalock et al. 2020",
          "magnitude, global", EQUAL),
    Claim("accuracy", "LAMP beats equal shares", "Lee et al. 2021", "magnitude, LAMP", EQUAL),
    Claim("accuracy", "rounds beat one shot", "Han et al. 2015",
          "magnitude, Han's rounds", "magnitude, Han's thresholds"),
    Claim("accuracy", f"OBD {BEFORE} than magnitude", "LeCun et al. 1989",
          "OBD, Gauss-Newton", "magnitude, global", "pruned"),
    Claim("accuracy", f"Wanda {BEFORE} than magnitude", "Sun et al. 2023",
          "Wanda", EQUAL, "pruned"),
    Claim("accuracy", f"SparseGPT {BEFORE} than Wanda", "Sun et al. 2023",
          "SparseGPT", "Wanda", "pruned"),
    Claim("accuracy", "movement: soft beats hard", "Sanh et al. 2020",
          "soft movement", "movement"),
    Claim("accuracy", "soft movement beats magnitude on its schedule", "Sanh et al. 2020",
          "soft movement", "magnitude, while retraining"),
    Claim("accuracy", f"2:4: Wanda {BEFORE} than magnitude", "Sun et al. 2023",
          "Wanda, 2:4", "magnitude, 2:4", "pruned"),
    Claim("accuracy", f"OWL {BEFORE} than equal shares", "Yin et al. 2024",
          "Wanda, OWL", "Wanda", "pruned"),
    Claim("accuracy", f"L1 while training {BEFORE} than L2", "Han et al. 2015",
          "magnitude, after L1", "magnitude, after L2", "pruned"),
    Claim("accuracy", "L2 while training beats L1 once retrained", "Han et al. 2015",
          "magnitude, after L2", "magnitude, after L1"),
    Claim("accuracy", f"a refit by least squares {BEFORE}", "He et al. 2017",
          "magnitude, refitted", "magnitude, global", "pruned"),
    Claim("accuracy", f"2:4: permuting channels first {BEFORE}", "Pool & Yu 2021",
          "magnitude, permuted, 2:4", "magnitude, 2:4", "pruned"),
    Claim("accuracy", "convolutions: single weights beat kernels", "Mao et al. 2017",
          "ResNet-8, unstructured", "ResNet-8, kernel"),
    Claim("accuracy", "convolutions: kernels beat filters", "Mao et al. 2017",
          "ResNet-8, kernel", "ResNet-8, filter"),
    Claim("accuracy", "gradual magnitude beats a random start", "Lee et al. 2024 (JaxPruner)",
          "gradual magnitude", FIXED),
    Claim("accuracy", "20 rounds of SNIP beat one", "Verdenius et al. 2020",
          "SNIP, 20 rounds", "SNIP"),
    Claim("accuracy", "filters: L1 norm beats random", "Li et al. 2017",
          "L1 norm", "random units"),
    Claim("snip", "SNIP beats random", "Lee et al. 2019", "SNIP", FIXED),
    Claim("snip", "SNIP beats magnitude at the start", "Lee et al. 2019",
          "SNIP", "magnitude of the first weights"),
    Claim("snip", "random weights do as well, in SNIP's shares", "Frankle et al. 2021",
          SHUFFLED, "SNIP"),
    Claim("snip", "LeNet-5: SNIP beats random", "Lee et al. 2019",
          "SNIP, LeNet-5", "random, LeNet-5"),
    Claim("gradual", "large and sparse beats small and dense", "Zhu & Gupta 2017",
          "gradual magnitude", "small, dense"),
    Claim("rigl", "SET beats static", EVCI, "SET, ERK", "random at start, ERK"),
    Claim("rigl", "RigL beats SET", EVCI, "RigL, ERK", "SET, ERK"),
    Claim("rigl", "RigL: ERK beats uniform", EVCI, "RigL, ERK", "RigL, uniform"),
    Claim("rigl", "RigL beats small and dense", EVCI, "RigL, ERK", "small, dense"),
    Claim("rigl", "gradual magnitude beats RigL in as many steps", EVCI,
          "gradual magnitude", "RigL, uniform"),
    Claim("lottery", "tickets beat new weights", FRANKLE, "ticket", "new weights"),
    Claim("lottery", "tickets beat random masks", FRANKLE, "ticket", "random mask"),
    Claim("damage", "OBD loses less than magnitude", "LeCun et al. 1989",
          "OBD, Gauss-Newton", "magnitude", "rise"),
    Claim("lottery", "the learning rate alone does as well", "Renda et al. 2020",
          "ticket, learning rate alone", "ticket"),
    Claim("lottery", "rewinding to epoch 1 beats epoch 0", "Frankle et al. 2020",
          "ticket, to epoch 1", "ticket"),
)  # fmt: skip


def gaps(claim: Claim, points: Sequence[Point]) -> dict[float, list[float]]:
    """By how much one line is better, by sparsity; a number for each seed that both lines have."""
    sides = []
    order = (claim.better, claim.worse)
    for name in order[::-1] if claim.metric == "rise" else order:
        own = [p for p in points if p.line == name and p.metric == claim.metric]
        sides.append({(p.sparsity, p.seed): p.value for p in own})
    found: dict[float, list[float]] = {}
    for key in sorted(sides[0].keys() & sides[1].keys()):
        found.setdefault(key[0], []).append(sides[0][key] - sides[1][key])
    return found


def verdict(differences: Sequence[float]) -> str:
    """`yes` or `no` where the mean is larger than its deviation over the seeds, else `open`."""
    if len(differences) < 2:
        return "open"
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if abs(mean) <= deviation:
        return "open"
    return "yes" if mean > 0 else "no"
