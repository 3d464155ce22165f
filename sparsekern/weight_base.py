"""What every sparse weight is: a module with plain dense tensors, whatever its format.

No tensor subclass and no sparse-layout tensor, so that optimizers, deepcopy, pickle, `.to()`, DDP
and torch.compile work unaided. `values` is an ordinary parameter. All else is plain tensors that
move and are saved like buffers but are none: an average of a model (`AveragedModel` and the like)
takes the mean of every buffer, and means of indices, schedules or int8 values are nonsense.
An average must be of one pattern: after loading another one into the model, begin a new average.
DistributedDataParallel sends parameters alone, so that all ranks must be made with one pattern:
after the same `torch.manual_seed`, by the same conversion, or from one file.
"""

import warnings

import torch
from torch import Tensor, nn

INT32_MAX = 2**31 - 1
PLANS = "plan", "plan_t"
# An entry without content in every state_dict. A dense model that meets it cannot know us; what its
# load_state_dict then prints is this name.
HINT = "needs_sk_load_or_sk_to_dense"


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
        with torch.inference_mode(False):
            self.plan, self.plan_t = (
                torch.empty(0, dtype=torch.int32, device=values.device) for _ in PLANS
            )
        if plans:
            self._make_plans(training=False)

    @property
    def nnz(self) -> int:
        """Number of weights that are stored."""
        return self.values.numel()

    @property
    def needs_sk_load_or_sk_to_dense(self) -> Tensor:
        """The entry HINT; torch.distributed.checkpoint looks for an attribute behind each entry."""
        return self.values.detach().new_empty(0, dtype=torch.int32)

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

    def with_parts(
        self, parts: dict, pattern=None, *, dtype=None, device=None, assign: bool = False
    ) -> "SparseWeight":
        """A weight like this one around other parts, with schedules; this one is not changed.

        Args:
            parts: All of `parts`, of any source: nothing is allocated or computed before the sizes
                are found to be those of a weight of this shape.
            pattern: What the nonzeros follow, by default what they follow here.
            dtype: Of values in floating point, by default that of this weight.
            device: By default that of this weight.
            assign: Take the tensors themselves instead of copies in this dtype on this device.

        Raises:
            ValueError: A part is missing, no tensor, or not what the format wants.
            RuntimeError: No kernel takes such a weight.
        """
        device = torch.device(self.device if device is None else device)
        _refuse_incomplete(self.parts, parts, assign or device.type == "meta")
        twin = type(self).__new__(type(self))
        tables = {"_parameters": dict(self._parameters), "_buffers": dict(self._buffers)}
        twin.__dict__.update(self.__dict__, **tables)
        twin._follow(self.pattern if pattern is None else pattern)
        twin._check({name: parts[name] for name in self.parts})
        with torch.no_grad():
            for name in self.parts:
                own = getattr(self, name)
                wanted = dtype if dtype and own.is_floating_point() and name == "values" else None
                part = parts[name] if assign else _copied(parts[name], device, wanted or own.dtype)
                setattr(twin, name, _like(own, part if part.is_contiguous() else part.contiguous()))
            twin._settle()
            for name in PLANS:
                setattr(twin, name, getattr(self, name).new_empty(0, device=twin.device))
            twin._make_plans(training=self.plan_t.numel() > 0)
        return twin

    def become(self, other: "SparseWeight", assign: bool = False) -> None:
        """Take over what `with_parts` made of this weight.

        Values in place where shapes agree, so that optimizers stay right; else, with `assign`, and
        from the meta device `values` is a new parameter.
        """
        for name in self.parts:
            old, new = getattr(self, name), getattr(other, name)
            fits = old.shape == new.shape and old.device == new.device and not assign
            if fits and isinstance(old, nn.Parameter):
                overwrite(old, new)
            else:  # the schedules are bound to the new indices
                setattr(self, name, new)
        self.plan, self.plan_t = other.plan, other.plan_t
        self._follow(other.pattern)

    def _follow(self, pattern) -> None:
        """Note the pattern of the nonzeros."""
        self.pattern = str(pattern)

    def _settle(self) -> None:
        """Make what is noted beside the parts agree with them."""

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

    def _replicate_for_data_parallel(self):
        """What DataParallel asks for: it sends parameters and buffers alone to other devices."""
        raise RuntimeError(
            f"{type(self).__name__}: expected torch.nn.parallel.DistributedDataParallel, got "
            "torch.nn.DataParallel, whose replicas lack the indices"
        )

    def __setstate__(self, state):
        """What deepcopy and pickle end with: the kernels read a copy of a plan at every call."""
        super().__setstate__(state)
        self.__dict__.update(self._buffers)  # which these tensors were in older pickles
        self._buffers.clear()
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
        destination[prefix + HINT] = getattr(self, HINT)
        for name in self._fixed():
            part = getattr(self, name)
            destination[prefix + name] = part if keep_vars else part.detach()

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
        elif before[0].type == "cpu" and _memory(self.plan) != memory:
            self._renew_or_drop_plans()
        return self

    def _renew_or_drop_plans(self) -> None:
        """After all tensors moved: share_memory() keeps their contents, to_empty() does not."""
        try:
            self._renew_plans()
        except RuntimeError:  # no indices at all; loading some makes the plans
            self.plan, self.plan_t = self.plan.new_empty(0), self.plan.new_empty(0)

    def load_fault(self, state_dict, prefix: str, assign: bool) -> str:
        """Why the parts under `prefix` cannot be loaded, or an empty string; nothing is changed."""
        name = prefix.removesuffix(".")
        if name in state_dict:
            return (
                f"{name}: expected the parts of a sparse weight ({', '.join(self.parts)}), got a "
                "dense weight; sk.load(model, path) fills sparse layers from dense files, "
                "sk.to_dense(model) makes the layers dense"
            )
        given = {part: state_dict[prefix + part] for part in self._present(state_dict, prefix)}
        if not given:
            return ""
        try:
            self.with_parts(given, assign=assign)
        except (ValueError, RuntimeError) as error:
            return f"{name}: {error}"
        return ""

    def _present(self, state_dict, prefix: str) -> list[str]:
        return [name for name in self.parts if prefix + name in state_dict]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Take over a weight with another number of values; all parts of it or nothing."""
        arguments = (strict, missing_keys, unexpected_keys, error_msgs)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, *arguments)
        present = self._present(state_dict, prefix)
        if strict:
            known = {prefix + name for name in (*self.parts, HINT)}
            missing_keys += [prefix + name for name in self.parts if name not in present]
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]
        if not present:
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            fresh = self.with_parts({n: state_dict[prefix + n] for n in present}, assign=assign)
        except (ValueError, RuntimeError) as error:
            fault = f"{prefix.removesuffix('.')}: {error}"
            if fault not in error_msgs:  # the layer around has found it, too
                error_msgs.append(fault)
            return
        if fresh.device.type == "meta" and not assign:
            warnings.warn(
                f"{prefix.removesuffix('.')} is on the meta device, so load_state_dict gives it no "
                "content; pass assign=True or use sk.load",
                stacklevel=2,
            )
        if not error_msgs:  # what another layer refused will raise: stay as we are
            self.become(fresh, assign)


def overwrite(old: Tensor, new: Tensor) -> None:
    """Copy into a tensor, also one that was made in inference mode."""
    with torch.inference_mode(old.is_inference()), torch.no_grad():
        old.copy_(new)


def _refuse_incomplete(names: tuple[str, ...], parts: dict, meta_allowed: bool) -> None:
    """ValueError unless there is a plain tensor for every name, and all have data or none."""
    lacking = [name for name in names if parts.get(name) is None]
    if lacking:
        raise ValueError(f"expected all of {', '.join(names)}, got no {', '.join(lacking)}")
    for name in names:
        part = parts[name]
        if not isinstance(part, Tensor) or part.is_nested or part.layout != torch.strided:
            got = part.layout if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"expected {name} to be a dense tensor, got {got}")
    devices = {parts[name].device for name in names}
    if len(devices) > 1:
        got = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"expected all parts on one device, got {got}")
    if parts[names[0]].is_meta and not meta_allowed:
        raise ValueError("expected parts with data, got some on the meta device")


def _copied(part: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return part.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def _like(own: Tensor, part: Tensor) -> Tensor:
    """A parameter if `own` is one, that trains if `own` does."""
    if not isinstance(own, nn.Parameter):
        return part.detach()
    part = part if isinstance(part, nn.Parameter) else nn.Parameter(part.detach())
    return part.requires_grad_(own.requires_grad)


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
