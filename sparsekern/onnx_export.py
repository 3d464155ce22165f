"""ONNX has no sparse product: an export of a converted model says what to do first."""

from __future__ import annotations

import functools
import sys


def refuse_export(what: str) -> None:
    """Raise RuntimeError inside of `torch.onnx.export`, whichever exporter it is."""
    onnx = sys.modules.get("torch.onnx")  # not there: nobody exports, and it is not to be imported
    if onnx is not None and onnx.is_in_onnx_export():
        raise RuntimeError(
            f"{what}: expected a model of dense layers for ONNX, which has no sparse product, got "
            "a sparse layer; export sparsekern.to_dense(copy.deepcopy(model))"
        )


def no_export(name: str, fake):
    """The fake of an op, which an exporter that traces calls, too."""

    @functools.wraps(fake)
    def run(*args, **kwargs):
        refuse_export(name)
        return fake(*args, **kwargs)

    return run
