# SPDX-License-Identifier: Apache-2.0
"""The few functions of libcuda that the agent calls: make memory, export it, zero it.

Why it exists, and is not `cuda.bindings.driver`: the agent calls a dozen functions whose ABI has not changed
since driver 465; cuda-python adds about 30 MB to its image, a release for every CUDA version, and a look-up
of its own that a test cannot point at another libcuda. ctypes loads the library when it is asked to, so an
agent on a machine without a driver can still say what is missing.

Threading model: one thread; the context, where one is used, is current in that thread. Callers: physical.py.

    DeviceError
    └── CudaError          libcuda refused; `.code` is the CUresult
"""

from __future__ import annotations

import ctypes
from typing import Any

from valve_agent.devices.base import DeviceError, DeviceMissing

LIBRARY = "libcuda.so.1"
OUT_OF_MEMORY = 2
_POSIX_FD, _PINNED, _ON_DEVICE, _READ_WRITE = 1, 1, 1, 3


class CudaError(DeviceError):
    def __init__(self, function: str, code: int, name: str) -> None:
        super().__init__(f"{function}: {name} ({code})")
        self.code = code


class Prop(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_uint8 * 8),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location_type", ctypes.c_int), ("location_id", ctypes.c_int), ("flags", ctypes.c_int))


_U64, _SIZE, _INT, _PTR = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGetCount": (_PTR,),
    "cuDeviceGetUuid_v2": (_PTR, _INT),
    "cuDevicePrimaryCtxRetain": (_PTR, _INT),
    "cuCtxSetCurrent": (_PTR,),
    "cuCtxSynchronize": (),
    "cuMemGetAllocationGranularity": (_PTR, _PTR, _INT),
    "cuMemCreate": (_PTR, _SIZE, _PTR, ctypes.c_ulonglong),
    "cuMemRelease": (_U64,),
    "cuMemExportToShareableHandle": (_PTR, _U64, _INT, ctypes.c_ulonglong),
    "cuMemAddressReserve": (_PTR, _SIZE, _SIZE, _U64, ctypes.c_ulonglong),
    "cuMemMap": (_U64, _SIZE, _SIZE, _U64, ctypes.c_ulonglong),
    "cuMemUnmap": (_U64, _SIZE),
    "cuMemSetAccess": (_U64, _SIZE, _PTR, _SIZE),
    "cuMemsetD8Async": (_U64, ctypes.c_ubyte, _SIZE, _PTR),
}


class CudaDriver:
    """libcuda in this process, initialised."""

    def __init__(self) -> None:
        """Raises DeviceMissing, CudaError."""
        self._context = _PTR()
        try:
            self._library: Any = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise DeviceMissing(
                f"{LIBRARY} cannot be loaded ({error}): install the NVIDIA driver's user-space libraries, or "
                "mount them into the agent's container (NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
            ) from error
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise DeviceMissing(f"{LIBRARY} has no {name}: install driver 535 or later")
            function.argtypes = arguments
        self._call("cuInit", 0)

    def devices(self) -> int:
        count = _INT()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def uuid(self, ordinal: int) -> bytes:
        """The 16 bytes that UVM and NVML know the GPU by."""
        value = (ctypes.c_uint8 * 16)()
        self._call("cuDeviceGetUuid_v2", value, ordinal)
        return bytes(value)

    def granularity(self, ordinal: int) -> int:
        """Bytes that every allocation is a multiple of."""
        value = _SIZE()
        self._call("cuMemGetAllocationGranularity", ctypes.byref(value), ctypes.byref(_prop(ordinal)), 0)
        return value.value

    def create(self, ordinal: int, size_bytes: int) -> int:
        """A physical allocation that can be exported; it needs no context. Raises CudaError."""
        handle = _U64()
        self._call("cuMemCreate", ctypes.byref(handle), size_bytes, ctypes.byref(_prop(ordinal)), 0)
        return handle.value

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    def export(self, handle: int) -> int:
        """A descriptor of the allocation, which any process can import; the caller's to close."""
        fd = _INT(-1)
        self._call("cuMemExportToShareableHandle", ctypes.byref(fd), handle, _POSIX_FD, 0)
        return fd.value

    def retain_context(self, ordinal: int) -> None:
        """Make the device's primary context, in which `zero` and `synchronize` work from now on."""
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ordinal)

    def reserve(self, size_bytes: int) -> int:
        base = _U64()
        self._call("cuMemAddressReserve", ctypes.byref(base), size_bytes, 0, 0, 0)
        return base.value

    def map(self, ordinal: int, base: int, size_bytes: int, handle: int) -> None:
        """Map an allocation and let the device use it."""
        self._call("cuMemMap", base, size_bytes, 0, handle, 0)
        access = Access(_ON_DEVICE, ordinal, _READ_WRITE)
        self._call("cuMemSetAccess", base, size_bytes, ctypes.byref(access), 1)

    def unmap(self, base: int, size_bytes: int) -> None:
        self._call("cuMemUnmap", base, size_bytes)

    def zero(self, base: int, size_bytes: int) -> None:
        """Start to fill with zeros; `synchronize` waits for it."""
        self._call("cuCtxSetCurrent", self._context)  # the thread serves other GPUs too
        self._call("cuMemsetD8Async", base, 0, size_bytes, None)

    def synchronize(self) -> None:
        self._call("cuCtxSetCurrent", self._context)
        self._call("cuCtxSynchronize")

    def _call(self, function: str, *arguments: object) -> None:
        code = int(getattr(self._library, function)(*arguments))
        if code:
            raise CudaError(function, code, self._name(code))

    def _name(self, code: int) -> str:
        name = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(name))
        return (name.value or b"unknown error").decode()


def _prop(ordinal: int) -> Prop:
    return Prop(_PINNED, _POSIX_FD, _ON_DEVICE, ordinal)
