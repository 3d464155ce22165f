"""NVIDIA's sparse libraries: where they are and which version runs, without starting CUDA."""

import ctypes
import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SharedLibrary:
    """A library that the CUDA half opens at run time.

    Attributes:
        name: As people write it.
        soname: Its file; a library of that name which torch has loaded already is used again.
        prefix: Of its functions.
        minimum: Oldest version whose functions we call, (major, minor).
    """

    name: str
    soname: str
    prefix: str
    minimum: tuple[int, int]


CUSPARSE = SharedLibrary("cuSPARSE", "libcusparse.so.12", "cusparse", (12, 0))
CUSPARSELT = SharedLibrary("cuSPARSELt", "libcusparseLt.so.0", "cusparseLt", (0, 8))


def library_places(library: SharedLibrary) -> list[str]:
    """What to open, in this order: the plain name, the folders of pip wheels, the toolkit."""
    folders: list[Path] = []
    nvidia = importlib.util.find_spec("nvidia")
    for place in (nvidia.submodule_search_locations or ()) if nvidia else ():
        folders += sorted(Path(place).glob("*/lib"))
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    folders.append(Path(home, "lib64"))
    return [
        library.soname,
        *(str(f / library.soname) for f in folders if (f / library.soname).exists()),
    ]


def read_version(handle, prefix: str) -> tuple[int, int, int]:
    """Major, minor and patch version by the library's own `GetProperty`.

    Raises:
        AttributeError: The library has no such function.
        OSError: The function reports an error.
    """
    parts = []
    for which in range(3):
        value = ctypes.c_int(-1)
        if getattr(handle, f"{prefix}GetProperty")(which, ctypes.byref(value)) != 0:
            raise OSError(f"{prefix}GetProperty failed")
        parts.append(value.value)
    return tuple(parts)


@functools.cache
def find_library(library: SharedLibrary) -> tuple[tuple[int, int, int] | None, str]:
    """The version that is loaded, or None and the reason. Loads the library, starts no device."""
    reason = ""
    for place in library_places(library):
        try:
            version = read_version(ctypes.CDLL(place), library.prefix)
        except (OSError, AttributeError) as error:
            reason = reason or str(error)
            continue
        return version, version_fault(library, version)
    return None, f"expected {library.name} {_text(library.minimum)} or newer, got none: {reason}"


def version_fault(library: SharedLibrary, version) -> str:
    """Say that a version is too old; empty when it is not."""
    if tuple(version[:2]) >= library.minimum:
        return ""
    return f"expected {library.name} {_text(library.minimum)} or newer, got {_text(version)}"


def _text(version) -> str:
    return ".".join(map(str, version))
