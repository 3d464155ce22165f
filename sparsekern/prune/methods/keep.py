"""Keep: exactly the zeros that are there."""

from dataclasses import dataclass
from typing import ClassVar

from .base import Method


@dataclass(frozen=True)
class Keep(Method):
    """Keep exactly the zeros that are there while training, whoever made them and in any pattern.

    Nothing is chosen: what is 0 when the Pruner is made stays 0, and everything else trains. Takes
    neither schedule nor scope; a sparsity or a pattern, if given, must be what the weights have.
    """

    scope: ClassVar[str] = "uniform"
    one_shot: ClassVar[bool] = False
    keeps: ClassVar[bool] = True
