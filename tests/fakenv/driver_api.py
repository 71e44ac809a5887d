# SPDX-License-Identifier: Apache-2.0
"""A thin binding of the CUDA driver API for victims and peers in tests. Every failure raises CudaError.

Works on a real libcuda too, except that the kernels are the fake's.
"""

from __future__ import annotations

import ctypes

PAGE = 2 << 20


class CudaError(Exception):
    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function}: {code}")
        self.code = code


class Prop(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_uint8 * 8),
    )


class Access(ctypes.Structure):
    _fields_ = (("location_type", ctypes.c_int), ("location_id", ctypes.c_int), ("flags", ctypes.c_int))


class Cuda:
    """One process's use of one GPU through its primary context."""

    def __init__(self, gpu: int = 0, context: bool = True) -> None:
        self.lib = ctypes.CDLL("libcuda.so.1")
        self.gpu = gpu
        self("cuInit", 0)
        if not context:
            return
        ctx = ctypes.c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(ctx), gpu)
        self("cuCtxSetCurrent", ctx)
        self.module = ctypes.c_void_p()
        self("cuModuleLoadData", ctypes.byref(self.module), b"image")

    def __call__(self, function: str, *args: object) -> None:
        code = self.code(function, *args)
        if code:
            raise CudaError(function, code)

    def code(self, function: str, *args: object) -> int:
        """Calls and returns the CUresult; plain integers are passed as 64 bits."""
        wide = [ctypes.c_uint64(a) if isinstance(a, int) and not isinstance(a, bool) else a for a in args]
        result: int = getattr(self.lib, function)(*wide)
        return result

    # ---- kernels ----
    def launch(self, kernel: str, *args: int, stream: int = 0) -> None:
        f = ctypes.c_void_p()
        self("cuModuleGetFunction", ctypes.byref(f), self.module, kernel.encode())
        values = [ctypes.c_uint64(a) for a in args]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(v) for v in values])
        self("cuLaunchKernel", f, 1, 1, 1, 1, 1, 1, 0, ctypes.c_void_p(stream), pointers, None)

    def stream(self) -> int:
        s = ctypes.c_void_p()
        self("cuStreamCreate", ctypes.byref(s), 0)
        assert s.value
        return s.value

    def synchronize(self) -> None:
        self("cuCtxSynchronize")

    # ---- memory ----
    def alloc(self, size: int) -> int:
        p = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(p), size)
        return p.value

    def host(self, size: int) -> int:
        p = ctypes.c_void_p()
        self("cuMemHostAlloc", ctypes.byref(p), size, 0)
        assert p.value
        return p.value

    def read64(self, address: int) -> int:
        """Reads host memory (or, on the fake alone, mapped device memory)."""
        return ctypes.c_uint64.from_address(address).value

    def reserve(self, size: int) -> int:
        p = ctypes.c_uint64()
        self("cuMemAddressReserve", ctypes.byref(p), size, 0, 0, 0)
        return p.value

    def create(self, size: int, exportable: bool = False) -> int:
        handle = ctypes.c_uint64()
        prop = Prop(1, int(exportable), 1, self.gpu)
        self("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(prop), 0)
        return handle.value

    def map(self, base: int, size: int, handle: int, access: bool = True) -> None:
        self("cuMemMap", base, size, 0, handle, 0)
        if access:
            self.access(base, size)

    def access(self, base: int, size: int) -> None:
        self("cuMemSetAccess", base, size, ctypes.byref(Access(1, self.gpu, 3)), 1)

    def unmap(self, base: int, size: int) -> None:
        self("cuMemUnmap", base, size)

    def export(self, handle: int) -> int:
        fd = ctypes.c_int()
        self("cuMemExportToShareableHandle", ctypes.byref(fd), handle, 1, 0)
        return fd.value

    def import_(self, fd: int) -> int:
        handle = ctypes.c_uint64()
        self("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(fd), 1)
        return handle.value

    def info(self) -> tuple[int, int]:
        """(free, total) bytes"""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value
