"""Which layers' weights code of the model may read itself, told from the code alone.

Without example inputs no run shows that `x @ self.proj.weight` never calls `self.proj`; a sparse
layer in its place would then break the model. So the bytecode that a forward can reach is searched
for `weight`; a layer that it may mean stays dense.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

from torch import nn

from .sites import kind_of

_ANY = "*"  # read of something that is not named beside it


def readers(model: nn.Module) -> dict[int, str]:
    """Why layers must stay dense, by the id of the layer; only those that may be read."""
    found: dict[int, str] = {}
    for module in model.modules():
        if _is_of(type(module).__module__, "torch", __package__):
            continue
        names = _read_by(module)
        if not names:
            continue
        for path, child in module.named_modules():
            named = _ANY in names or names.intersection(path.split("."))
            if path and named and kind_of(child):
                found.setdefault(
                    id(child),
                    f"{type(module).__name__} may read its weight itself (its code has `.weight`); "
                    "pass example_inputs to see",
                )
    return found


def _is_of(name: str, *packages: str) -> bool:
    return name.partition(".")[0] in packages


def _read_by(module: nn.Module) -> set[str]:
    """Names of children whose weight is read in the code that the forward can reach."""
    kind = type(module)
    todo = [base.__dict__.get("forward") for base in kind.__mro__]
    todo += [value for value in vars(module).values() if isinstance(value, FunctionType)]
    names: set[str] = set()
    for function in functions_of(kind, todo):
        for code in code_with_nested(function.__code__):
            names |= _weights_in(code)
    return names


def functions_of(kind: type, todo: list) -> Iterator[FunctionType]:
    """All functions that some may call, themselves included, without those of torch.

    Args:
        kind: The class whose methods they may call.
        todo: Functions, methods and properties to begin with; changed.
    """
    seen: set[CodeType] = set()
    while todo:
        for function in _functions(todo.pop()):
            if function.__code__ in seen or _is_of(function.__module__ or "", "torch"):
                continue
            seen.add(function.__code__)
            yield function
            codes = code_with_nested(function.__code__)
            todo += _reachable(function, {name for c in codes for name in c.co_names}, kind)


def _functions(thing) -> list[FunctionType]:
    """The Python functions behind a method, a property, a decorator or a partial."""
    if isinstance(thing, (staticmethod, classmethod)):
        thing = thing.__func__
    if isinstance(thing, property):
        return [f for f in (thing.fget,) if isinstance(f, FunctionType)]
    found = []
    while isinstance(thing, FunctionType):
        found.append(thing)
        thing = getattr(thing, "__wrapped__", None)
    return found


def code_with_nested(code: CodeType) -> list[CodeType]:
    """The code of a function, and of what is defined inside of it."""
    nested = [const for const in code.co_consts if isinstance(const, CodeType)]
    return [code, *(inner for const in nested for inner in code_with_nested(const))]


def _weights_in(code: CodeType) -> set[str]:
    """Names before `.weight`; `*` where it is something else, or a name that is looked up."""
    names, before = set(), None
    for step in dis.get_instructions(code):
        constant = step.opname == "LOAD_CONST"
        path = constant and isinstance(step.argval, str) and step.argval.endswith(".weight")
        if path or (step.opname.startswith("LOAD") and step.argval == "weight"):
            attribute = before is not None and before.opname in ("LOAD_ATTR", "LOAD_METHOD")
            local = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME"))
            if constant or not local:
                names.add(before.argval if attribute and not constant else _ANY)
        if step.opname != "CACHE":
            before = step
    return names


def _reachable(function: FunctionType, used: set[str], kind: type) -> list:
    """What a function may call: methods of the class, functions it knows by name or encloses."""
    scope = function.__globals__
    found = [inspect.getattr_static(kind, name, None) for name in used]
    found += [scope.get(name) for name in used]
    modules = [scope[name] for name in used if isinstance(scope.get(name), ModuleType)]
    ours = [m for m in modules if not _is_of(m.__name__, "torch")]
    found += [vars(m).get(name) for m in ours for name in used]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return found
