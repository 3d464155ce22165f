"""The sides of a whole model: dense torch, other engines, ours. As `baselines.py` for a layer."""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import rounds
import torch
from baselines import OURS, Side, first_line, relative_error
from peers import install
from peers.client import ENGINES, Peer, PeerError
from peers.engines import OPSET
from torch import Tensor, nn
from zoo import Model

import sparsekern as sk
from sparsekern.parts import InParts

# Largest accepted error, relative to the largest exact output: tens of layers in float32, some by
# Winograd's transform, each of which may lose a digit against float64.
TOLERANCE = 1e-3
FOLDED = "eager folded channels_last"
COMPILED = f"{OURS} + torch.compile"
GRAPH_ENGINES = ("onnxruntime", "openvino", "deepsparse")
DENSE_WEIGHTS = ", dense weights"


@dataclass
class Contest:
    """One model at one sparsity and batch, and what its sides share.

    Attributes:
        model: Which one.
        sparsity: Share of zeros in what is pruned.
        batch: Number of images or sequences.
        layers: What the conversion did, once our side was built.
    """

    model: Model
    sparsity: float
    batch: int
    layers: str | None = field(default=None, init=False)

    @cached_property
    def x(self) -> Tensor:
        """The input."""
        return self.model.inputs(self.batch)

    @cached_property
    def pruned(self) -> nn.Module:
        """The pruned model as torch runs it."""
        return self.model.load(self.sparsity)

    @cached_property
    def folded(self) -> nn.Module:
        """A copy of it with BatchNorm folded."""
        return self.fold(self.pruned)

    def fold(self, model: nn.Module) -> nn.Module:
        """A copy of a model with BatchNorm folded."""
        model = copy.deepcopy(model)
        sk.fold_batchnorm(model, self.x)
        return model

    def fastest_layout(self) -> tuple[nn.Module, Tensor]:
        """Folded model and input; images in channels_last."""
        if self.x.dim() != 4:
            return self.folded, self.x
        model = copy.deepcopy(self.folded).to(memory_format=torch.channels_last)
        return model, self.x.contiguous(memory_format=torch.channels_last)

    def exact(self, model: nn.Module) -> Tensor:
        """Output of a model in float64."""
        x = self.x.double() if self.x.is_floating_point() else self.x
        return copy.deepcopy(model).double()(x)


def eager(c: Contest) -> Callable[[], Tensor]:
    """The model as it is."""
    return lambda: c.pruned(c.x)


def folded(c: Contest) -> Callable[[], Tensor]:
    """BatchNorm folded, channels_last."""
    model, x = c.fastest_layout()
    return lambda: model(x)


def compiled(c: Contest) -> Callable[[], Tensor]:
    """torch.compile with its defaults, of the folded model."""
    model, x = c.fastest_layout()
    call = torch.compile(model, dynamic=False)
    return lambda: call(x)


def frozen(c: Contest) -> Callable[[], Tensor]:
    """torch.compile that may treat weights as constants: oneDNN and MKL pack them ahead."""
    model, x = c.fastest_layout()
    # As an option too: else dynamo takes it for the same compiler and reuses `compiled`.
    call = torch.compile(model, dynamic=False, options={"freezing": True})
    with torch._inductor.config.patch(freezing=True):
        call(x)
    return lambda: call(x)


def folded_in_parts(c: Contest) -> Callable[[], Tensor]:
    """As `folded`, one image at a time: activations of a batch leave the caches."""
    model, x = c.fastest_layout()
    return partial(InParts(model, 1), x)


def frozen_in_parts(c: Contest) -> Callable[[], Tensor]:
    """As `frozen`, one image at a time."""
    model, x = c.fastest_layout()
    images = x.split(1)
    call = torch.compile(model, dynamic=False, options={"freezing": True})
    with torch._inductor.config.patch(freezing=True):
        call(images[0])
    return lambda: torch.cat([call(image) for image in images])


def converted(c: Contest) -> nn.Module:
    """Our model, folded."""
    model = sk.convert_to_sparse(copy.deepcopy(c.folded), c.x, cache=False, progress=False)
    c.layers = sk.report(model).summary()
    return model


DENSE = {
    "eager": eager,
    FOLDED: folded,
    "torch.compile": compiled,
    "torch.compile freezing": frozen,
}
IN_PARTS = {  # of batches of images
    f"{FOLDED}, image by image": folded_in_parts,
    "torch.compile freezing, image by image": frozen_in_parts,
}


def sides(
    c: Contest, engines: list[str], stack: ExitStack, say: Callable[[str], None]
) -> tuple[list[Side], dict[str, str]]:
    """Everything that runs the model and gets it right, ours last.

    Args:
        c: The model and its input.
        engines: Of `peers.client.ENGINES`, those to try; the number of threads is torch's.
        stack: Ends their processes and removes their files.
        say: Told the name of a side before it is built, which may take a minute.

    Returns:
        The sides, and for each one left out the reason.

    Raises:
        RuntimeError: our own result is wrong, or no dense side runs.
    """
    exact, found, left_out = c.exact(c.pruned), [], {}

    def attempt(name: str, role: str, make: Callable[[], Callable[[], Tensor]]) -> None:
        say(name)
        try:
            call = make()
            found.append(Side(name, role, rounds.local(call), checked(name, call(), exact)))
        except Exception as error:
            left_out[name] = first_line(error)

    images = c.x.dim() == 4
    for name, make in (DENSE | IN_PARTS if images and c.batch > 1 else DENSE).items():
        if name != FOLDED or images:  # text models have nothing to fold
            attempt(name, "dense", lambda make=make: make(c))
    if not found:
        raise RuntimeError(f"bench: expected a dense side, got {left_out}")
    add_engines(c, engines, exact, stack, say, found, left_out)
    say(OURS)
    ours = converted(c)
    attempt(COMPILED, "ours", lambda: partial(torch.compile(ours, dynamic=False), c.x))
    error = checked(OURS, ours(c.x), exact)
    found.append(Side(OURS, "ours", rounds.local(partial(ours, c.x)), error))
    return found, left_out


def add_engines(c, engines, exact, stack, say, found, left_out) -> None:
    """The other engines, on the pruned weights; DeepSparse also on the dense ones."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    wanted = [(e, ENGINES[e], c.folded, exact) for e in engines if e in GRAPH_ENGINES]
    if "deepsparse" in engines:
        dense = c.model.load(0.0)
        name = ENGINES["deepsparse"] + DENSE_WEIGHTS
        wanted.append(("deepsparse", name, c.fold(dense), c.exact(dense)))
    for engine, name, model, reference in wanted:
        say(name)
        try:
            if not install.installed(engine):
                raise PeerError(f"not installed: {install.command(engine)}")
            path = folder / f"{'pruned' if model is c.folded else 'dense'}.onnx"
            if not path.exists():
                export(model, c.x, path)
            job = {"kind": "onnx", "threads": torch.get_num_threads(), "model": str(path)}
            peer = stack.enter_context(Peer(engine, job, {"x": c.x}))
            error = checked(name, peer.result()[0], reference)
            found.append(Side(name, "peer", peer.sample, error, peer.version))
        except Exception as error:
            left_out[name] = first_line(error)


def checked(name: str, got: Tensor, exact: Tensor) -> float:
    """The error of a result.

    Raises:
        RuntimeError: it is above `TOLERANCE`.
    """
    error = relative_error(got, exact)
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"bench: expected {name} to be right to {TOLERANCE:g}, "
            f"got a relative error of {error:.1e}"
        )
    return error


def export(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write a model as ONNX of fixed shapes, old enough for DeepSparse.

    Raises:
        PeerError: the onnx package is not installed.
    """
    model = copy.deepcopy(model)
    for part in model.modules():
        # The fused attention of torch has no counterpart in ONNX before opset 14.
        if hasattr(part, "set_attn_implementation") and x.dim() == 2:
            part.set_attn_implementation("eager")
            break
    with _onnx_package(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes are meant to be constants of the trace
        torch.onnx.export(model, (x,), str(path), dynamo=False, opset_version=OPSET,
                          input_names=["x"], output_names=["y"])  # fmt: skip


@contextmanager
def _onnx_package() -> Iterator[None]:
    """Make onnx importable from its own environment; numpy and all else stay ours."""
    if not install.installed("onnx"):
        raise PeerError(f"onnx not installed: {install.command('onnx')}")
    found = [str(p) for p in install.folder("onnx").glob("[Ll]ib*/**/site-packages")]
    sys.path.extend(found)
    try:
        yield
    finally:
        for entry in found:
            sys.path.remove(entry)
