"""What a forward reads besides its input, to be compared at later calls; what may not be traced.

A list of steps does what the forward did while it was traced, and nothing else. A forward that
counts its calls, keeps a feature for others or draws Python's random numbers would stop doing so;
one that reads a setting would not see it change.
"""

from __future__ import annotations

import copy
import dis
import functools
import sys
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import torch
from torch import nn

from .weight_reads import code_with_nested, functions_of

_OWN = {*vars(nn.Module()), "_compiled_call_impl"}  # what torch keeps in every module
_TABLES = ("_parameters", "_buffers", "_modules")
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_WORLD = {"random", "time", "datetime", "secrets", "numpy"}  # modules whose answers differ
_SPEAKS = {"print", "open", "input", "exec", "eval"}


class Unsteady(ValueError):
    """A forward does more than compute from its input, or reads what cannot be compared later."""


class State:
    """The settings that a traced forward read.

    Attributes:
        attributes: (module, name, value) of each attribute, also of the objects that hold
            settings; `Unsteady` where there was none.
        objects: (module, name, object) of each object of settings, such as a model's config.
        globals: (name of a Python module, name, value) of each global variable.
        autocast: Whether autocast was on, where that may have been asked; None elsewhere.
    """

    def __init__(self):
        self.attributes: list[tuple[object, str, object]] = []
        self.objects: list[tuple[object, str, object]] = []
        self.globals: list[tuple[str, str, object]] = []
        self.autocast: tuple[bool, ...] | None = None

    def holds(self) -> bool:
        """Whether all of them are as they were."""
        if self.autocast is not None and self.autocast != autocast():
            return False
        # Plain loops: this runs at every call of a block.
        for holder, name, value in self.objects:
            if getattr(holder, name, None) is not value:
                return False
        for holder, name, value in self.attributes:
            now = getattr(holder, name, Unsteady)
            if now is not value and not _is_same(now, value):
                return False
        for where, name, value in self.globals:
            now = getattr(sys.modules[where], name, Unsteady)
            if now is not value and not _is_same(now, value):
                return False
        return True


def autocast() -> tuple[bool, ...]:
    """Whether autocast is on, on the CPU and on a GPU."""
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _is_same(now, before) -> bool:
    return type(now) is type(before) and now == before


class Watch:
    """Sees what a forward reads from copies of modules, and refuses what it may not do."""

    def __init__(self):
        self.state, self.autocast = State(), autocast()
        self._handed: dict[tuple[int, str], tuple[object, object]] = {}

    def over(self, twin: nn.Module, module: nn.Module) -> None:
        """Watch a copy of a module by giving it a class derived from its own."""
        kind = type(twin)
        if "__func__" in dir(kind.__init_subclass__):
            raise Unsteady(f"{kind.__name__} keeps account of the classes derived from it")

        def read(self_, name):
            try:
                value = super(watched, self_).__getattribute__(name)
            except AttributeError:  # nn.Module looks among its tables next
                if not any(name in vars(module)[table] for table in _TABLES):
                    self.state.attributes.append((module, name, Unsteady))
                raise
            return value if _is_of_torch(kind, name) else self._seen(self_, module, name, value)

        def write(self_, name, value=None):
            raise Unsteady(f"it changes {name!r} of {kind.__name__}")

        namespace = {"__getattribute__": read, "__setattr__": write, "__delattr__": write}
        watched = type(kind)(kind.__name__, (kind,), namespace)
        twin.__class__ = watched

    def _seen(self, twin: nn.Module, module: nn.Module, name: str, value):
        """What a forward gets for an attribute: never something that it could change."""
        if isinstance(value, MethodType) and value.__self__ in (twin, module):
            self._check(type(module), [value.__func__])
            self.state.attributes.append((module, name, value))
            return value.__func__.__get__(twin)
        if type(value) is FunctionType:
            self._check(type(module), [value])
        elif not _is_steady(value):
            return self._settings(module, name, value)
        return self._copy_of(module, name, value)

    def _copy_of(self, holder, name: str, value):
        """A steady value of which a forward gets a copy, compared at later calls."""
        if (id(holder), name) in self._handed:
            return self._handed[id(holder), name][0]
        given, kept = value, value  # a partial is equal to itself alone
        if not callable(value):
            given, kept = copy.deepcopy(value), copy.deepcopy(value)
        self._handed[id(holder), name] = given, kept
        self.state.attributes.append((holder, name, kept))
        return given

    def _settings(self, holder, name: str, value) -> Settings:
        """An object of settings; refuses what is called, multiplied, or made of parts."""
        plain = hasattr(value, "__dict__") and not callable(value)
        if not plain or isinstance(value, (torch.Tensor, torch.Generator, ModuleType)):
            raise Unsteady(f"it reads {name!r}, a {type(value).__name__}")
        self.state.objects.append((holder, name, value))
        return Settings(self, value)

    def setting(self, target, name: str):
        """What a forward gets for an attribute of an object of settings."""
        try:
            value = getattr(target, name)
        except AttributeError:
            self.state.attributes.append((target, name, Unsteady))
            raise
        if _is_steady(value):
            return self._copy_of(target, name, value)
        return self._settings(target, name, value)

    def finish(self) -> State:
        """The settings; refuses a forward that changed one."""
        for (_, name), (given, kept) in self._handed.items():
            if given != kept:
                raise Unsteady(f"it changes {name!r}")
        return self.state

    def around(self, kinds: list[type]) -> None:
        """Refuse forwards whose code reads or changes what is neither theirs nor constant."""
        for kind in dict.fromkeys(kinds):
            self._check(kind, [b.__dict__.get("forward") for b in kind.__mro__])

    def _check(self, kind: type, functions: list) -> None:
        for function in functions_of(kind, functions):
            _check_closure(function)
            names = {n for c in code_with_nested(function.__code__) for n in c.co_names}
            if any("autocast" in name for name in names):
                self.state.autocast = self.autocast
            found = [(*where, value) for where, value in _globals_of(function).items()]
            self.state.globals += [one for one in found if one not in self.state.globals]


class Settings:
    """Stands for an object in a forward that is watched: its settings can be read, no more."""

    __slots__ = ("_target", "_watch")

    def __init__(self, watch: Watch, target):
        object.__setattr__(self, "_watch", watch)
        object.__setattr__(self, "_target", target)

    def __getattribute__(self, name: str):
        target = object.__getattribute__(self, "_target")
        if name == "__class__":
            return type(target)
        return object.__getattribute__(self, "_watch").setting(target, name)

    def __setattr__(self, name: str, value=None):
        raise Unsteady(f"it changes {name!r} of an object")

    __delattr__ = __setattr__


def _is_of_torch(kind: type, name: str) -> bool:
    """Whether an attribute is torch's own, or code of the class: its reads are seen themselves."""
    if name in _OWN or name == "forward" or name.startswith("__"):
        return True
    found = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    return isinstance(found, (FunctionType, property, staticmethod, classmethod))


def _is_constant(value) -> bool:
    """Whether a value is steady, and cannot be changed in place."""
    if type(value) in (list, set, dict):
        return False
    parts = value if type(value) in (tuple, frozenset) else ()
    return _is_steady(value) and all(map(_is_constant, parts))


def _is_steady(value) -> bool:
    """Whether a value can be compared, and does nothing that nobody sees when it is called."""
    if type(value) in _PLAIN:
        return True
    if type(value) in (tuple, list, set, frozenset, torch.Size):
        return all(map(_is_steady, value))
    if type(value) is dict:
        return all(map(_is_steady, value)) and all(map(_is_steady, value.values()))
    if isinstance(value, functools.partial):
        return _is_steady((value.func, value.args, value.keywords))
    code = isinstance(value, (type, FunctionType, BuiltinFunctionType)) and not _is_bound(value)
    return code and (getattr(value, "__module__", None) or "torch").startswith("torch")


def _check_closure(function: FunctionType) -> None:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if not _is_code(value) and not _is_constant(value):
            raise Unsteady(f"it reads {name!r}, a {type(value).__name__}, from around it")


def _is_code(value) -> bool:
    kinds = (type, FunctionType, BuiltinFunctionType, ModuleType)
    return isinstance(value, kinds) and not _is_bound(value)


def _is_bound(value) -> bool:
    """Whether a builtin function is the method of an object, such as `list.append` of a list."""
    owner = getattr(value, "__self__", None) if type(value) is BuiltinFunctionType else None
    return owner is not None and not isinstance(owner, (type, ModuleType))


def _globals_of(function: FunctionType) -> dict[tuple[str, str], object]:
    """The plain global variables that a function reads; refuses all others."""
    where, scope, found = function.__module__, function.__globals__, {}
    for code in code_with_nested(function.__code__):
        if any("inference_mode" in name for name in code.co_names):
            raise Unsteady("it asks for a mode, or switches one")
        for step in dis.get_instructions(code):
            name = step.argval
            outside = step.opname == "STORE_DEREF" and name in function.__code__.co_freevars
            if outside or step.opname == "STORE_GLOBAL":
                raise Unsteady(f"it changes {name!r}")
            if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME"):
                continue
            value = scope.get(name, Unsteady)
            world = isinstance(value, ModuleType) and value.__name__.partition(".")[0] in _WORLD
            if world or (value is Unsteady and name in _SPEAKS):
                raise Unsteady(f"it calls {name!r}")
            if value is Unsteady or _is_code(value):
                continue
            found_again = getattr(sys.modules.get(where), name, Unsteady) is value
            if not _is_constant(value) or not found_again:
                raise Unsteady(f"it reads {name!r}, a {type(value).__name__}")
            found[where, name] = value
    return found
