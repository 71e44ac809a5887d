# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver API for the qualification's processes: a thin binding, every failure raises CudaError.

Why it exists beside valve_agent's: victims and neighbours launch kernels, copy, make graphs and streams,
which the agent never does. The module is kernels.cu compiled for the GPU at hand; a fake driver takes any.

Threading model: CUDA's own; a context is current in the thread that made the Cuda object, and in others after
`enter`. Callers: code that parts send to an actor (actor.py).
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from valve_agent.devices.nvidia.cuda_driver import Access, Prop

PAGE = 2 << 20
_READ_WRITE = 3


class CudaError(Exception):
    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function} answers {code}")
        self.code = code


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2"""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("dimensions", ctypes.c_uint * 6),
        ("shared_bytes", ctypes.c_uint),
        ("params", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


class Cuda:
    """One process's use of one GPU."""

    def __init__(self, image: str = "", gpu: int = 0, own_context: bool = False) -> None:
        """`image`: path of the compiled kernels. `own_context`: a new context, not the primary one."""
        self.lib = ctypes.CDLL("libcuda.so.1")
        self.gpu = gpu
        self._maps: list[mmap.mmap] = []
        self("cuInit", 0)
        self.context = ctypes.c_void_p()
        if own_context:
            self("cuCtxCreate_v2", ctypes.byref(self.context), 0, gpu)
            self("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))  # creating has pushed it
        else:
            self("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), gpu)
        self.enter()
        self.module = ctypes.c_void_p()
        data = Path(image).read_bytes() if image else b"image"
        self("cuModuleLoadData", ctypes.byref(self.module), ctypes.c_char_p(data))
        self._functions: dict[str, ctypes.c_void_p] = {}

    def __call__(self, function: str, *args: object) -> None:
        code = self.code(function, *args)
        if code:
            raise CudaError(function, code)

    def code(self, function: str, *args: object) -> int:
        """The CUresult. Plain integers are passed as 64 bits: right for every integer parameter of the
        System V calling conventions."""
        wide = [ctypes.c_uint64(a) if isinstance(a, int) and not isinstance(a, bool) else a for a in args]
        result: int = getattr(self.lib, function)(*wide)
        return result

    def enter(self) -> None:
        """Make the context current in the calling thread."""
        self("cuCtxSetCurrent", self.context)

    def synchronize(self) -> None:
        self("cuCtxSynchronize")

    # -- kernels ---------------------------------------------------------------------------

    def function(self, kernel: str) -> ctypes.c_void_p:
        if kernel not in self._functions:
            self._functions[kernel] = ctypes.c_void_p()
            self("cuModuleGetFunction", ctypes.byref(self._functions[kernel]), self.module, kernel.encode())
        return self._functions[kernel]

    def launch(self, kernel: str, *args: int, grid: int = 1, block: int = 1, stream: int = 0) -> None:
        values = (ctypes.c_uint64 * max(1, len(args)))(*args)
        at = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * max(1, len(args)))(*[at + 8 * i for i in range(len(args))])
        f = self.function(kernel)
        self("cuLaunchKernel", f, grid, 1, 1, block, 1, 1, 0, ctypes.c_void_p(stream), pointers, None)

    def graph(self, kernel: str, *args: int) -> ctypes.c_void_p:
        """An executable graph of one kernel node."""
        graph, node, made = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        values = (ctypes.c_uint64 * len(args))(*args)
        at = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * len(args))(*[at + 8 * i for i in range(len(args))])
        params = KernelNode(
            self.function(kernel), (ctypes.c_uint * 6)(*[1] * 6), 0, ctypes.addressof(pointers)
        )
        self("cuGraphCreate", ctypes.byref(graph), 0)
        self("cuGraphAddKernelNode_v2", ctypes.byref(node), graph, None, 0, ctypes.byref(params))
        self("cuGraphInstantiateWithFlags", ctypes.byref(made), graph, 0)
        return made

    def stream(self, priority: int | None = None) -> int:
        made = ctypes.c_void_p()
        if priority is None:
            self("cuStreamCreate", ctypes.byref(made), 1)
        else:
            self("cuStreamCreateWithPriority", ctypes.byref(made), 1, ctypes.c_int(priority))
        assert made.value
        return made.value

    # -- memory ----------------------------------------------------------------------------

    def alloc(self, size: int) -> int:
        p = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(p), size)
        return p.value

    def host(self, size: int) -> int:
        """Pinned host memory that kernels reach under the same address."""
        p = ctypes.c_void_p()
        self("cuMemHostAlloc", ctypes.byref(p), size, 0)
        assert p.value
        return p.value

    def shared(self, path: str, size: int = 4096) -> int:
        """The device's address of a file's memory that other processes see too."""
        with open(path, "r+b") as file:
            self._maps.append(mmap.mmap(file.fileno(), size))
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._maps[-1]))
        self("cuMemHostRegister_v2", ctypes.c_void_p(at), size, 2)
        p = ctypes.c_uint64()
        self("cuMemHostGetDevicePointer_v2", ctypes.byref(p), ctypes.c_void_p(at), 0)
        return p.value

    def reserve(self, size: int) -> int:
        p = ctypes.c_uint64()
        self("cuMemAddressReserve", ctypes.byref(p), size, 0, 0, 0)
        return p.value

    def create(self, size: int) -> int:
        """A physical allocation that can be exported."""
        handle = ctypes.c_uint64()
        prop = Prop(1, 1, 1, self.gpu)
        self("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(prop), 0)
        return handle.value

    def map(self, base: int, size: int, handle: int) -> None:
        self("cuMemMap", base, size, 0, handle, 0)
        self("cuMemSetAccess", base, size, ctypes.byref(Access(1, self.gpu, _READ_WRITE)), 1)

    def unmap(self, base: int, size: int) -> None:
        self("cuMemUnmap", base, size)

    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def fill(self, at: int, size: int, value: int = 0x9E3779B9) -> None:
        self("cuMemsetD32_v2", at, ctypes.c_uint(value), size // 4)

    def read(self, at: int, size: int = 8) -> bytes:
        """Device memory, by a synchronous copy."""
        data = ctypes.create_string_buffer(size)
        self("cuMemcpyDtoH_v2", data, at, size)
        return data.raw

    def read64(self, at: int) -> int:
        return int.from_bytes(self.read(at), "little")
