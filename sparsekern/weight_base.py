"""What every sparse weight is: a module with plain dense tensors, whatever its format.

No tensor subclass and no sparse-layout tensor, so that optimizers, deepcopy, pickle, `.to()`, DDP
and torch.compile work unaided. `values` is an ordinary parameter. All else is plain tensors that
move and are saved like buffers but are none: an average of a model (`AveragedModel` and the like)
takes the mean of every buffer, and means of indices, schedules or int8 values are nonsense.
An average must be of one pattern: after loading another one into the model, begin a new average.
DistributedDataParallel sends parameters alone, so that all ranks must be made with one pattern:
after the same `torch.manual_seed`, by the same conversion, or from one file.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

INT32_MAX = 2**31 - 1
PLANS = "plan", "plan_t"


class SparseWeight(nn.Module):
    """The surviving weights of a layer; one subclass per format.

    Attributes:
        format: Name of the format.
        parts: Names of the tensors that make up the state, `values` first.
        values: The stored weights: a parameter, or a tensor of integers, which nothing trains.
        shape: Shape of the dense weight, `(out, in)` or `(out, in / groups, kh, kw)`.
        pattern: The pattern the nonzeros follow, as `sparsekern.patterns.parse` takes it.
        groups: Groups of the convolution, 1 for a linear layer.
        plan, plan_t: Schedules of the kernels, derived from the indices, not in the state_dict.
            `plan_t` serves the gradients and is made by `prepare_training`.
    """

    format = ""
    parts: tuple[str, ...] = ()

    def _set_up(self, shape, pattern, groups, plans: bool, values, **indices) -> None:
        """Take over checked parts; `plans=False` leaves a weight that only holds them."""
        nn.Module.__init__(self)
        values, *fixed = (_counted(part) for part in (values, *indices.values()))
        indices = dict(zip(indices, fixed, strict=True))
        self.shape = torch.Size(shape)
        self.pattern = str(pattern)
        self.groups = groups
        if values.is_floating_point():
            self.values = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
        else:
            self.values = values
        for name, index in indices.items():
            setattr(self, name, index)
        for name in PLANS:
            empty = torch.empty(0, dtype=torch.int32, device=values.device)
            setattr(self, name, _counted(empty))
        if plans:
            self._make_plans(training=False)

    @property
    def nnz(self) -> int:
        """Number of weights that are stored."""
        return self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Of the values; models that ask `layer.weight.dtype` get what they expect."""
        return self.values.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the layer computes in, and the dtype an input should have."""
        return self.values.dtype

    @property
    def product_dtype(self) -> torch.dtype:
        """What is multiplied, once the layer has prepared its operands."""
        return self.compute_dtype

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.values.device

    @property
    def taps(self) -> int:
        """Kernel positions of a convolution, 1 for a linear layer."""
        return self.shape[2:].numel()

    @property
    def sparsity(self) -> float:
        """Share of weights that are not stored."""
        total = self.shape.numel()
        return 1 - self.nnz / total if total else 0.0

    def indices(self) -> tuple[Tensor, ...]:
        """The tensors that say where the values belong."""
        return tuple(getattr(self, name) for name in self.parts[1:])

    def refilled(self, values: Tensor) -> "SparseWeight":
        """A weight on the CPU with other values at the same positions, without schedules.

        Args:
            values: On the CPU, floating point, in the shape of `values`.
        """
        indices = (index.cpu() for index in self.indices())
        return type(self)(values, *indices, self.shape, self.pattern, self.groups, plans=False)

    def to_dense(self) -> Tensor:
        """The dense weight, zeros where nothing is stored; differentiable in `values`."""
        return self._dense(self.values)

    def mask(self) -> Tensor:
        """Boolean mask in the shape of the dense weight, True = stored."""
        return self._dense(torch.ones_like(self.values, dtype=torch.bool))

    def prepare_training(self):
        """Make the schedule of the gradients once, instead of on every backward."""
        self._make_plans(training=True)
        return self

    def take(self, other: "SparseWeight") -> None:
        """Become a copy of a weight of the same format and shape, in the own dtype and device.

        With another number of values, `values` is a new parameter.
        """
        self.load_state_dict({name: getattr(other, name) for name in self.parts})
        self.pattern = other.pattern

    def extra_repr(self) -> str:
        """Shape, count and pattern."""
        return f"{tuple(self.shape)}, nnz={self.nnz}, sparsity={self.sparsity:.3f}, {self.pattern}"

    def gather(self, dense: Tensor) -> Tensor:
        """The values, in the shape of `values`, of a dense weight at the stored positions."""
        raise NotImplementedError

    def _dense(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def _check(self, parts: dict[str, Tensor]) -> None:
        """Raise ValueError unless these parts make a weight of this shape."""
        raise NotImplementedError

    def _make_plans(self, training: bool) -> None:
        if self.indices()[0].is_meta:
            return
        with torch.inference_mode(False):
            self.plan = self._plan(False)
            if training:
                self.plan_t = self._plan(True)
            elif self.plan_t.device != self.plan.device:  # loaded into a weight on meta
                self.plan_t = self.plan.new_empty(0)

    def __setstate__(self, state):
        """What deepcopy and pickle end with: the kernels read a copy of a plan at every call."""
        super().__setstate__(state)
        self._renew_plans()

    def _renew_plans(self) -> None:
        real = type(self.plan) is Tensor and self.plan.device.type == "cpu"
        if real and self.plan.numel() > 0:
            self._make_plans(training=self.plan_t.numel() > 0)

    def _plan(self, transpose: bool) -> Tensor:
        raise NotImplementedError

    def _plan_depends(self) -> tuple:
        """What else than the indices decides how the plans look."""
        return (self.indices()[0].device,)

    def _fixed(self) -> list[str]:
        """Names of the parts that no optimizer changes: all that are saved but not parameters."""
        return [name for name in self.parts if name not in self._parameters]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """As every module, and the parts that are no parameters."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._fixed():
            part = getattr(self, name)
            destination[prefix + name] = part if keep_vars else part.detach()

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """Let the parts be buffers while torch loads them: copied, or taken over with `assign`."""
        names = self._fixed()
        for name in names:
            self._buffers[name] = self.__dict__[name]
        try:
            yield
        finally:
            for name in names:
                self.__dict__[name] = self._buffers.pop(name)

    def _apply(self, fn, recurse=True):
        """As every module. The plans of one device mean nothing to another and are made again."""
        before, training = self._plan_depends(), self.plan_t.numel() > 0
        memory = _memory(self.plan)
        super()._apply(fn, recurse)
        for name in (*self._fixed(), *PLANS):
            setattr(self, name, fn(getattr(self, name)))
        # What comes from the meta device has no contents yet; loading them makes the plans.
        if before != self._plan_depends() and before[0].type != "meta" and self.plan.numel() > 0:
            self._make_plans(training)
        elif _memory(self.plan) != memory:  # share_memory()
            self._renew_plans()
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Take over a pattern with another number of values, after checking every index."""
        parts = {name: state_dict.get(prefix + name) for name in self.parts}
        complete = all(part is not None for part in parts.values())
        if complete:
            try:
                self._check(parts)
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")
                return
            self._resize(parts)
        with self._as_buffers():
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        if complete:
            self._make_plans(training=self.plan_t.numel() > 0)

    def _resize(self, parts: dict[str, Tensor]) -> None:
        for name in self.parts:
            old = getattr(self, name)
            if parts[name].shape == old.shape:
                continue
            fresh = old.detach().new_zeros(parts[name].shape)
            if isinstance(old, nn.Parameter):
                fresh = nn.Parameter(fresh, requires_grad=old.requires_grad)
            setattr(self, name, fresh)


def _memory(t: Tensor) -> int:
    """Where the data lies; nowhere that of fake tensors."""
    return t.data_ptr() if type(t) is Tensor else 0


def _counted(part: Tensor) -> Tensor:
    """A tensor of which torch counts the versions, which those of inference mode are not."""
    if not part.is_inference():
        return part
    with torch.inference_mode(False):
        fresh = part.clone()
        is_parameter = isinstance(part, nn.Parameter)
        return nn.Parameter(fresh, part.requires_grad) if is_parameter else fresh


def dense_weight(op: str, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A dense weight without gradient and its boolean mask (nonzeros by default), checked.

    Raises:
        ValueError: The weight is no floating point tensor with data of 2 or 4 dimensions, or the
            mask is no boolean one.
    """

    def check(condition, wanted, got):
        if not condition:
            raise ValueError(f"{op}: expected {wanted}, got {got}")

    weight = weight.detach()
    check(weight.dim() in (2, 4), "a weight of 2 or 4 dimensions", tuple(weight.shape))
    check(weight.is_floating_point(), "a floating point weight", weight.dtype)
    check(weight.numel() <= INT32_MAX, "fewer than 2^31 weights", weight.numel())
    check(not weight.is_meta, "a weight with data", "one on the meta device")
    kept = weight != 0 if mask is None else mask.reshape(weight.shape)
    check(kept.dtype == torch.bool, "a boolean mask", kept.dtype)
    return weight, kept
