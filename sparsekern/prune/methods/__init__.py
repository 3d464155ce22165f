"""The pruning methods, one small file each, by the name that `method=` takes."""

from dataclasses import fields

from .apoz import APoZ
from .base import Method
from .fpgm import FPGM
from .grasp import GraSP
from .keep import Keep
from .lp import Lp
from .magnitude import Magnitude
from .movement import Movement
from .obd import OptimalBrainDamage
from .random import Random
from .refit import Refit
from .rigl import RigL
from .set import SET
from .skeletonization import Skeletonization
from .slimming import Slimming
from .snip import SNIP
from .soft_movement import SoftMovement
from .sparsegpt import SparseGPT
from .srste import SRSTE
from .synflow import SynFlow
from .taylor import Taylor
from .wanda import Wanda

METHODS: dict[str, type[Method]] = {
    "apoz": APoZ,
    "fpgm": FPGM,
    "grasp": GraSP,
    "keep": Keep,
    "lp": Lp,
    "magnitude": Magnitude,
    "movement": Movement,
    "obd": OptimalBrainDamage,
    "random": Random,
    "refit": Refit,
    "rigl": RigL,
    "set": SET,
    "skeletonization": Skeletonization,
    "slimming": Slimming,
    "snip": SNIP,
    "soft_movement": SoftMovement,
    "sparsegpt": SparseGPT,
    "srste": SRSTE,
    "synflow": SynFlow,
    "taylor": Taylor,
    "wanda": Wanda,
}


def make_method(name: str, options: dict) -> Method:
    """Build a method from its name and options.

    Raises:
        ValueError: Unknown name.
        TypeError: Unknown option.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"prune: expected method one of {known}; got {name!r}")
    known = [f.name for f in fields(METHODS[name]) if f.init]
    for option in options:
        if option not in known:
            names = ", ".join(known) or "none"
            raise TypeError(
                f"prune: expected options of method {name!r} among {names}; got {option!r}"
            )
    return METHODS[name](**options)
