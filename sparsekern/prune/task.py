"""What a score may look at: the model, data, and gradients of a loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import sync
from .data import Batch
from .targets import Layer, parameters_of


@dataclass(frozen=True)
class Task:
    """A model with data and a loss.

    Attributes:
        model: The model, changed by nothing here.
        batches: Data, held in memory.
        loss_fn: `loss_fn(output, target)` giving a scalar; the target is None if there was none.
        distributed: Average what is measured over all ranks, and prune alike on all of them.
        notes: By layer name, what did not go as usual; filled while scoring.
    """

    model: nn.Module
    batches: Sequence[Batch] = ()
    loss_fn: Callable | None = None
    distributed: bool = False
    notes: dict[str, str] = field(default_factory=dict, compare=False)
    _reached: dict[str, list[bool]] = field(default_factory=dict, compare=False)

    @contextmanager
    def scoring(self, layers: Sequence[Layer], training: bool = False) -> Iterator[None]:
        """Make gradients of the layers' weights available and leave no trace.

        Modules run in eval mode, or in training mode with their buffers (BatchNorm statistics) put
        back and random numbers (dropout) drawn from a fixed seed. A layer that some batches do not
        reach (an expert) gets a note.

        Raises:
            ValueError: No loss on any batch depended on a layer.
        """
        self._reached.clear()
        flags = [(module, module.training) for module in self.model.modules()]
        frozen = [p for p in _parameters(self.model, layers) if not p.requires_grad]
        buffers = [(b, b.clone()) for b in self.model.buffers()] if training else []
        self.model.train(training)
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            with ExitStack() as stack:
                if training:
                    stack.enter_context(torch.random.fork_rng())
                    torch.manual_seed(0)
                stack.enter_context(torch.enable_grad())
                yield
            self._check_reached()
        finally:
            for module, flag in flags:
                module.training = flag
            for parameter in frozen:
                parameter.requires_grad_(False)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def losses(self, temperature: float = 1.0) -> Iterator[Tensor]:
        """Yield the loss of each batch, with outputs divided by `temperature` first."""
        for output, target in self.outputs():
            if temperature != 1:
                output = as_tensor(output, "with temperature other than 1") / temperature
            yield self.loss(output, target)

    def outputs(self) -> Iterator[tuple]:
        """Yield output and target of each batch."""
        for batch in self.batches:
            yield self.model(*batch.args, **batch.kwargs), batch.target

    def loss(self, output, target) -> Tensor:
        """Loss of one batch, checked to be a scalar that depends on parameters."""
        loss = self.loss_fn(output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = _describe(loss)
            raise ValueError(f"prune: expected loss_fn to give a scalar with gradient, got {got}")
        return loss

    def gradients(
        self,
        loss: Tensor,
        layers: Sequence[Layer],
        graph: bool = False,
        keep: bool = False,
        partial: bool = False,
    ) -> list[Tensor]:
        """Gradients by the weights, each `(out, in, *kernel)`, at least float32.

        Args:
            loss: Scalar.
            layers: A weight that several parameters share gets the sum of their gradients.
            graph: Build a graph of the gradients, so that they can be differentiated again.
            keep: Keep the graph of the loss for another call.
            partial: A second derivative, which may be 0: do not count the layers it reaches.

        Returns:
            0 for a layer that the loss does not depend on; one that no loss of a scoring depended
            on is refused at its end.
        """
        groups = [parameters_of(self.model, layer) for layer in layers]
        flat = [p for group in groups for p in group]
        options = {"create_graph": graph, "retain_graph": graph or keep, "allow_unused": True}
        found = iter(torch.autograd.grad(loss, flat, **options))
        gradients = []
        for layer, group in zip(layers, groups):
            parts = [g for g in (next(found) for _ in group) if g is not None]
            if not partial:
                self.count_reach(layer, bool(parts))
            total = sum(parts[1:], parts[0]) if parts else torch.zeros_like(group[0])
            gradients.append(layer.oriented(_at_least_float32(total)))
        return gradients

    def count_reach(self, layer: Layer, reached: bool) -> None:
        """Remember whether the loss of a batch depended on a layer."""
        self._reached.setdefault(layer.name, []).append(reached)

    def _check_reached(self) -> None:
        if not self._reached:
            return
        hits = torch.tensor([float(sum(found)) for found in self._reached.values()])
        hits = hits.to(next(self.model.parameters()).device)
        self.average([hits])
        for (name, found), total in zip(self._reached.items(), hits.tolist()):
            if not total:
                raise ValueError(
                    f"prune: expected a loss that depends on layer {name!r}, got one that does "
                    "not, on any batch; add the layer to ignore"
                )
            if not all(found):
                missed = round(found.count(False) / len(found) * len(self.batches))
                self.notes[name] = f"{missed} of {len(self.batches)} batches did not reach it"

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average over the ranks in place, if this task is distributed."""
        if self.distributed:
            sync.average(tensors)

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Take over what rank 0 has, in place, if this task is distributed."""
        if self.distributed:
            sync.broadcast(tensors)


def _parameters(model: nn.Module, layers: Sequence[Layer]) -> list[nn.Parameter]:
    return [p for layer in layers for p in parameters_of(model, layer)]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def as_tensor(output, when: str) -> Tensor:
    """Pass a tensor through, refuse anything else."""
    if not isinstance(output, Tensor):
        got = type(output).__name__
        raise TypeError(f"prune: expected the model to give a tensor {when}, got {got}")
    return output


def _describe(loss) -> str:
    if not isinstance(loss, Tensor):
        return type(loss).__name__
    return f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
