"""Forwards of blocks, rewritten so that sparse convolutions do what stands around them.

A block whose forward can be traced (`tracing.py`) gets one in which its convolutions add the
residual (`residual.py`) and put the zeros around their input themselves (`padding.py`), run step by
step (`steps.py`). The block itself, its children and its parameters stay where they are.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .chain import is_hooked
from .measure.structure import forward_call
from .nn import SparseConv2d
from .padding import fuse_pads
from .residual import fuse_sums
from .steps import at, run, steps_of
from .traced_state import State
from .tracing import trace


class FusedBlock:
    """The forward of a block in which convolutions add residuals and pad their input.

    In training mode, on images of a size it was not traced for, and where modules inside of it were
    replaced or hooked or settings changed since, the block runs as it was written.

    Attributes:
        block: The module whose forward this is.
        steps: What the forward does.
        inner: Path of each module whose own forward is among the steps, and the module.
        size: `(channels, height, width)` of the input it holds for, None where it holds for all.
        state: The settings that it holds for.
        sums: How many residuals convolutions add.
        pads: How many paddings are theirs now.
    """

    def __init__(self, block: nn.Module, steps, inner, size, state: State, sums: int, pads: int):
        self.block, self.steps, self.inner = block, steps, inner
        self.size, self.state, self.sums, self.pads = size, state, sums, pads

    def __call__(self, x: Tensor) -> Tensor:
        """The output of the block."""
        block = self.block
        fits = not block.training and (self.size is None or self.size == tuple(x.shape[1:]))
        if fits and (not self.inner or self._is_as_traced()) and self.state.holds():
            return run(self.steps, block, x)
        return type(block).forward(block, x)

    def _is_as_traced(self) -> bool:
        return all(
            at(self.block, path) is module and not module.training and not is_hooked(module)
            for path, module in self.inner
        )


@dataclass(frozen=True)
class BlockSlot:
    """The place of a forward; hung in and out like a module in its slot."""

    module: nn.Module  # the block as it was
    name: str

    def put(self, forward: FusedBlock | nn.Module) -> None:
        """Give the block this forward; the block itself stands for its own."""
        self.module.__dict__.pop("forward", None)
        if isinstance(forward, FusedBlock):
            self.module.forward = forward


def restore_blocks(model: nn.Module) -> None:
    """Give every block its own forward back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedBlock):
            del module.forward


def fused_blocks(model: nn.Module, inputs) -> list[tuple[BlockSlot, FusedBlock]]:
    """Blocks inside of a converted model, in eval mode, whose forward has something to fuse.

    Blocks with a residual sum come before those that only pad, and inner ones before outer ones; no
    two overlap. Each was run on the input it sees in a run of the model, and gave the output of the
    block as it was written, to rounding.
    """
    blocks = {name: m for name, m in model.named_modules() if name and _is_plain(m)}
    seen = _first_inputs(model, inputs, blocks.values()) if blocks else {}
    fused = {name: fuse_block(m, seen.get(m)) for name, m in reversed(blocks.items())}
    fused = {name: one for name, one in fused.items() if one is not None}
    chosen: dict[str, FusedBlock] = {}
    for with_sums in (True, False):
        for name, one in fused.items():
            if bool(one.sums) is with_sums and not any(_overlap(name, other) for other in chosen):
                chosen[name] = one
    if not chosen:
        return []
    right = _compare(model, inputs, {blocks[name]: one for name, one in chosen.items()})
    names = [name for name in blocks if name in chosen and blocks[name] in right]
    return [(BlockSlot(blocks[name], name), chosen[name]) for name in names]


def _overlap(name: str, other: str) -> bool:
    """Whether one of two modules holds the other, or is it."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")


def _is_plain(block: nn.Module) -> bool:
    """A composed module with a forward of one tensor, which nothing hooks into."""
    if not any(isinstance(m, SparseConv2d) for m in block.modules()) or isinstance(block, _LEAVES):
        return False
    arguments = list(inspect.signature(type(block).forward).parameters.values())[1:]
    single = len(arguments) == 1 and arguments[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return single and not any(is_hooked(m) for m in block.modules())


_LEAVES = (SparseConv2d, nn.Sequential, nn.ModuleList, nn.ModuleDict)


def fuse_block(block: nn.Module, example: Tensor | None) -> FusedBlock | None:
    """The forward with sums and zeros inside of convolutions; None where there is nothing.

    Args:
        block: In eval mode.
        example: One image as the block sees it, None where it was not called with one tensor.
    """
    traced = trace(block, example)
    if traced is None:
        return None
    graph, modules = traced.graph, dict(block.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    pads, sums = fuse_pads(graph, modules), fuse_sums(graph, modules)
    if not pads and not sums:
        return None
    steps = steps_of(graph)
    if steps is None:
        return None
    inner = tuple((tuple(name.split(".")), modules[name]) for name in traced.inner)
    return FusedBlock(block, steps, inner, traced.size, traced.state, sums, pads)


def _first_inputs(model: nn.Module, inputs, blocks) -> dict[nn.Module, Tensor]:
    """An image of zeros like the first that each block saw in a run of the model."""
    seen: dict[nn.Module, Tensor] = {}

    def enter(block, args, kwargs):
        one = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() == 4
        if one and block not in seen:
            seen[block] = args[0].new_zeros(1, *args[0].shape[1:])

    _run_with(model, inputs, [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks])
    return seen


def _run_with(model: nn.Module, inputs, hooks: list) -> bool:
    """One run of the model, after which the hooks go; whether it went well."""
    try:
        with torch.inference_mode():
            forward_call(model, inputs)()
    except Exception:  # a conversion runs the model again, and says why it failed
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


def _compare(model: nn.Module, inputs, blocks: dict[nn.Module, FusedBlock]) -> set[nn.Module]:
    """The blocks that were called, give the same on the inputs of a run, and change no input."""
    equal: dict[nn.Module, bool] = {}
    seen: dict[nn.Module, Tensor] = {}

    def enter(block, args, kwargs):
        seen[block] = args[0].clone() if len(args) == 1 and not kwargs else None

    def leave(block, args, y):
        try:
            before = seen.pop(block)
            got = blocks[block](before)
            tolerance = 1e-4 if y.dtype == torch.float32 else 1e-2
            same = got.shape == y.shape and torch.equal(before, args[0])
            same = same and bool((got - y).abs().max() <= tolerance * y.abs().max())
        except Exception:
            same = False
        equal[block] = equal.get(block, True) and same

    hooks = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    hooks += [b.register_forward_hook(leave) for b in blocks]
    ran = _run_with(model, inputs, hooks)
    return {block for block, same in equal.items() if ran and same}
