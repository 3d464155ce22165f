"""The lines of all figures, by the group they are shown in.

A name stands for one thing in all experiments, which share their results: what one of them ran is
there for the others.
"""

from functools import partial

from lines import SLIMMING, Line, owl_shares, shares_of

import sparsekern as sk

LAST = ("fc3",)  # its units are the classes
NORM = "LeNet-300-100, BatchNorm"
UNITS = (0.5, 0.8)  # sparsities of whole units, whose columns in the next layer die as well
L1, L2 = (
    partial(sk.weight_penalty, strength=strength, p=p) for strength, p in ((1e-3, 1), (1e-3, 2))
)
SOFT = {"strength": 100.0, "lr": 0.1}  # scores have 75 steps to move

DENSE = Line("dense")
_after = partial(Line, when="after")
_units = partial(Line, when="after", pattern="filter", ignore=LAST, sparsities=UNITS)


def _pattern(name: str, method: str, pattern: str, when: str = "after", **choices) -> Line:
    fixed = (0.5,) if pattern.startswith("2:4") else (0.9,)
    full = f"{name}, {pattern}"
    return Line(full, method, when, pattern=pattern, sparsities=fixed, **choices)


AFTER = (
    _after("random after training", "random", scope="uniform"),
    _after("magnitude, layer by layer", "magnitude", scope="uniform"),
    _after("magnitude, global", "magnitude", scope="global"),
    _after("magnitude, LAMP", "magnitude", scope="lamp"),
    _after("magnitude, ERK", "magnitude", scope="erk"),
    _after("magnitude, Han's thresholds", "magnitude", scope="std"),
    _after("magnitude, Han's rounds", "magnitude", scope="std", schedule="rounds"),
    _after("magnitude, after L1", "magnitude", penalty=L1),
    _after("magnitude, after L2", "magnitude", penalty=L2),
    _after("magnitude, refitted", "magnitude", refitted=True),
    _after("Taylor", "taylor"),
    _after("OBD, Gauss-Newton", "obd"),
    _after("OBD, Hutchinson", "obd", options={"curvature": "hutchinson"}),
    _after("SNIP score after training", "snip"),
    _after("Wanda", "wanda"),
    _after("Wanda, OWL", "wanda", scope=owl_shares),
    _after("SparseGPT", "sparsegpt"),
    _after("refit", "refit"),
    _after("magnitude, while retraining", "magnitude", scope="uniform", schedule="late"),
    _after("movement", "movement", schedule="late"),
    _after("soft movement", "soft_movement", schedule="late", options=SOFT),
)
STATIC = Line("random at start, uniform", "random", scope="uniform")
STATIC_ERK = Line("random at start, ERK", "random", scope="erk")
SNIP = Line("SNIP", "snip")
GRADUAL = Line("gradual magnitude", "magnitude", scope="uniform", schedule="cubic")
GRADUAL_GLOBAL = Line("gradual magnitude, global", "magnitude", schedule="cubic")
SET = Line("SET, ERK", "set", schedule="updates")
RIGL = Line("RigL, ERK", "rigl", schedule="updates")
SMALL = Line("small, dense", small=True)
START = (
    STATIC,
    STATIC_ERK,
    SNIP,
    Line("SNIP, 20 rounds", "snip", options={"iterations": 20}),
    Line("GraSP", "grasp"),
    Line("SynFlow", "synflow"),
    SET,
    RIGL,
    GRADUAL,
    GRADUAL_GLOBAL,
    Line("SR-STE", "srste", schedule="steps"),
)
WHOLE = (
    _units("random units", "random", scope="uniform"),
    _units("L1 norm", "lp", options={"p": 1}),
    _units("L2 norm", "lp"),
    _units("geometric median", "fpgm"),
    _units("APoZ", "apoz"),
    _units("Skeletonization", "skeletonization", scope="uniform"),
    _units("Taylor, units", "taylor", scope="uniform"),
    _units("L1 norm, BatchNorm", "lp", options={"p": 1}, network=NORM, penalty=SLIMMING),
    _units("slimming", "slimming", network=NORM, penalty=SLIMMING),
)
SHAPED = (
    _pattern("magnitude", "magnitude", "block:16x16", scope="uniform"),
    _pattern("magnitude", "magnitude", "block:4x4", scope="uniform"),
    _pattern("magnitude", "magnitude", "vector:4x1", scope="uniform"),
    _pattern("magnitude", "magnitude", "2:4"),
    _pattern("magnitude, permuted", "magnitude", "2:4", permuted=True),
    _pattern("magnitude", "magnitude", "2:4T"),
    _pattern("Wanda", "wanda", "vector:1x8"),
    _pattern("Wanda", "wanda", "2:4"),
    _pattern("SparseGPT", "sparsegpt", "vector:4x1"),
    _pattern("SparseGPT", "sparsegpt", "2:4"),
    _pattern("SNIP", "snip", "block:32x32", "start"),
    _pattern("SNIP", "snip", "vector:4x1", "start"),
    _pattern("RigL", "rigl", "block:16x16", "start", schedule="updates"),
    _pattern("RigL", "rigl", "2:4", "start", schedule="updates"),
    _pattern("SR-STE", "srste", "2:4", "start", schedule="steps"),
    _pattern("SR-STE", "srste", "2:4T", "start", schedule="steps"),
)
_resnet = partial(
    Line, when="after", network="ResNet-8", scope="uniform", ignore=("fc",), sparsities=UNITS
)
GRAINS = (
    Line("dense, ResNet-8", network="ResNet-8"),
    *(
        _resnet(f"ResNet-8, {pattern}", "magnitude", pattern=pattern)
        for pattern in ("unstructured", "vector:4x1", "block:4x4", "kernel", "channel", "filter")
    ),
)
SNIP_MLP = (
    SNIP,
    Line("SNIP's share of every layer, at random", "random", scope=shares_of("snip")),
    Line("magnitude of the first weights", "magnitude"),
    STATIC,
)
_lenet_5 = partial(Line, network="LeNet-5", images=1500, sparsities=(0.95, 0.98))
SNIP_CNN = (
    _lenet_5("dense, LeNet-5"),
    _lenet_5("SNIP, LeNet-5", "snip"),
    _lenet_5("random, LeNet-5", "random", scope="uniform"),
)
DYNAMIC = (
    SMALL,
    STATIC,
    STATIC_ERK,
    Line("SET, uniform", "set", scope="uniform", schedule="updates"),
    SET,
    Line("RigL, uniform", "rigl", scope="uniform", schedule="updates"),
    RIGL,
    GRADUAL,
)
