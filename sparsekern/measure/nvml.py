"""The few calls of NVML that we use, straight from the driver's library.

Same names as in the package nvidia-ml-py, which this stands in for where it is not installed.
Source: NVML API reference.
"""

from __future__ import annotations

import ctypes

SM_CLOCK, MEMORY_CLOCK = 1, 2
NOT_SUPPORTED = 3
TEXT_SIZE = 96


class Nvml:
    """NVML through ctypes.

    Args:
        library: The loaded library; by default libnvidia-ml.so.1.

    Raises:
        OSError: there is no such library.
    """

    class NVMLError(Exception):
        """What NVML answered instead of a value."""

    class NVMLError_NotSupported(NVMLError):
        """The card does not have it."""

    def __init__(self, library=None) -> None:
        self._library = library or ctypes.CDLL("libnvidia-ml.so.1")
        self._library.nvmlErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = self._library.nvmlErrorString(code)
            kind = self.NVMLError_NotSupported if code == NOT_SUPPORTED else self.NVMLError
            raise kind(text.decode() if text else f"{name} returned {code}")

    def _number(self, name: str, *arguments, kind=ctypes.c_uint) -> int:
        value = kind()
        self._call(name, *arguments, ctypes.byref(value))
        return value.value

    def nvmlInit(self) -> None:
        """Start NVML; more than once does no harm."""
        self._call("nvmlInit_v2")

    def nvmlSystemGetDriverVersion(self) -> str:
        """Version of the driver."""
        text = ctypes.create_string_buffer(TEXT_SIZE)
        self._call("nvmlSystemGetDriverVersion", text, ctypes.c_uint(TEXT_SIZE))
        return text.value.decode()

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> ctypes.c_void_p:
        """The card of a UUID, `GPU-...`."""
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))
        return handle

    def nvmlDeviceGetTotalEnergyConsumption(self, handle) -> int:
        """Millijoules since the driver was loaded."""
        name = "nvmlDeviceGetTotalEnergyConsumption"
        return self._number(name, handle, kind=ctypes.c_ulonglong)

    def nvmlDeviceGetMigMode(self, handle) -> tuple[int, int]:
        """Whether the card is split now, and after its next reset."""
        now, later = ctypes.c_uint(), ctypes.c_uint()
        self._call("nvmlDeviceGetMigMode", handle, ctypes.byref(now), ctypes.byref(later))
        return now.value, later.value

    def nvmlDeviceGetClockInfo(self, handle, kind: int) -> int:
        """Megahertz of `SM_CLOCK` or `MEMORY_CLOCK` now."""
        return self._number("nvmlDeviceGetClockInfo", handle, ctypes.c_int(kind))

    def nvmlDeviceGetMaxClockInfo(self, handle, kind: int) -> int:
        """Megahertz at most."""
        return self._number("nvmlDeviceGetMaxClockInfo", handle, ctypes.c_int(kind))

    def nvmlDeviceGetPowerUsage(self, handle) -> int:
        """Milliwatts now."""
        return self._number("nvmlDeviceGetPowerUsage", handle)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle) -> int:
        """Milliwatts at most."""
        return self._number("nvmlDeviceGetEnforcedPowerLimit", handle)
