"""Inputs and outputs of a model: how to call it, where it lives, how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


def forward_call(model: nn.Module, example_inputs) -> Callable[[], object]:
    """A function of no arguments that runs `model` on `example_inputs`.

    Args:
        model: any module.
        example_inputs: one tensor, a tuple or list of positional arguments, or a mapping of
            keyword arguments.
    """
    if isinstance(example_inputs, torch.Tensor):
        return lambda: model(example_inputs)
    if isinstance(example_inputs, Mapping):
        return lambda: model(**example_inputs)
    return lambda: model(*example_inputs)


def check_inputs(example_inputs, op: str) -> None:
    """Raise TypeError or ValueError unless `example_inputs` is of a kind `forward_call` takes."""
    if not isinstance(example_inputs, (torch.Tensor, tuple, list, Mapping)):
        raise TypeError(
            f"{op}: expected example_inputs to be a tensor, a tuple of arguments or a dict of "
            f"keyword arguments, got {type(example_inputs).__name__}"
        )
    if not tensors_of(example_inputs):
        raise ValueError(f"{op}: expected at least one tensor in example_inputs, got none")


def tensors_of(tree) -> dict[str, torch.Tensor]:
    """Every tensor in nested tuples, lists, mappings and transformers' ModelOutput, by its path."""
    return dict(_walk(tree, ""))


def _walk(tree, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path or "output", tree
    elif isinstance(tree, Mapping):  # transformers' ModelOutput is one
        for key, value in tree.items():
            yield from _walk(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (tuple, list)):
        for index, value in enumerate(tree):
            yield from _walk(value, f"{path}[{index}]")


def model_device(model: nn.Module, name: str, op: str) -> torch.device:
    """The one device all parameters and buffers of `model` are on.

    Args:
        model: the model.
        name: what to call it in errors (`dense`, `sparse`).
        op: the function that asks, for errors.

    Raises:
        TypeError: if it is not a module.
        ValueError: if it has no parameters, is on several devices or on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected {name} to be a torch.nn.Module, got {_type(model)}")
    if next(model.parameters(), None) is None:
        raise ValueError(f"{op}: expected {name} to have parameters, got {_type(model)} with none")
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}
    if len(devices) > 1:
        found = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(f"{op}: expected {name} to be on one device, got {found}")
    device = devices.pop()
    if device.type == "meta":
        raise ValueError(f"{op}: expected {name} to hold data, got a model on the meta device")
    return device


def common_device(dense: nn.Module, sparse: nn.Module, example_inputs, op: str) -> torch.device:
    """The device both models and the inputs share; ValueError when they do not share one."""
    device = model_device(dense, "dense", op)
    other = model_device(sparse, "sparse", op)
    if device != other:
        raise ValueError(
            f"{op}: expected both models on one device, got dense on {device} and sparse on {other}"
        )
    for path, tensor in tensors_of(example_inputs).items():
        if tensor.device != device:
            raise ValueError(
                f"{op}: expected example_inputs on {device} like the models, "
                f"got {_input_name(path)} on {tensor.device}"
            )
    return device


def _input_name(path: str) -> str:
    return "the tensor" if path == "output" else path


def _type(value) -> str:
    return type(value).__name__


@contextmanager
def evaluating(*models: nn.Module):
    """Evaluation mode without autograd; every module gets its own training flag back at the end."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, training in before:
            module.training = training


def output_error(dense_out, sparse_out, op: str) -> tuple[float, float]:
    """Largest difference between two outputs of the same structure.

    Returns:
        The largest absolute difference over all tensors, and the largest over tensors of
        (largest absolute difference / largest absolute dense value). Equal values, also equal
        infinities and NaN on both sides, differ by 0; a NaN on one side only differs by infinity.

    Raises:
        ValueError: if structure or shapes differ, or there is no tensor in the output.
    """
    dense, sparse = tensors_of(dense_out), tensors_of(sparse_out)
    if list(dense) != list(sparse):
        raise ValueError(
            f"{op}: expected both models to return the same structure, "
            f"got {list(dense)} from dense and {list(sparse)} from sparse"
        )
    if not dense:
        raise ValueError(f"{op}: expected a tensor in the models' output, got {_type(dense_out)}")
    worst = [_tensor_error(path, dense[path], sparse[path], op) for path in dense]
    return max(absolute for absolute, _ in worst), max(relative for _, relative in worst)


def _tensor_error(path: str, dense, sparse, op: str) -> tuple[float, float]:
    if dense.shape != sparse.shape:
        raise ValueError(
            f"{op}: expected output {path} of the same shape from both models, "
            f"got {tuple(dense.shape)} from dense and {tuple(sparse.shape)} from sparse"
        )
    if dense.numel() == 0:
        return 0.0, 0.0
    wide = torch.complex128 if dense.is_complex() or sparse.is_complex() else torch.float64
    d, s = dense.detach().to(wide), sparse.detach().to(wide)
    same = (d == s) | (d.isnan() & s.isnan())
    gap = torch.where(same, 0.0, (d - s).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    absolute, scale = gap.max().item(), d.abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    if absolute == 0:
        return 0.0, 0.0
    return absolute, absolute / scale if scale else float("inf")
