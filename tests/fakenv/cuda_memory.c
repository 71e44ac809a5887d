/* SPDX-License-Identifier: Apache-2.0
 *
 * Classic memory calls. Copies run on the copy engines' channels, fills on the stream's own: so a
 * copy in flight is not stopped by disabling the compute group alone, as on a GPU.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cuda_fake.h"

enum { MEMORYTYPE_HOST = 1, MEMORYTYPE_DEVICE = 2 };
enum { COPY_IN = FAKENV_COMPUTE_MAX, COPY_OUT = FAKENV_COMPUTE_MAX + 1 };

struct array_shape { size_t width, height; unsigned format, channels; };

API CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
    struct context *ctx;
    struct fakenv_query query;
    CUresult r = cuda_current(&ctx);
    if (r)
        return r;
    uint32_t status = rm_query(ctx->gpu, &query);
    *total = query.total_bytes;
    *free_bytes = query.total_bytes - query.used_bytes;
    return cuda_result(status);
}

API CUresult cuMemAlloc_v2(CUdeviceptr *base, size_t bytes)
{
    struct context *ctx;
    CUresult r = cuda_current(&ctx);
    if (r || !bytes)
        return r ? r : CUDA_ERROR_INVALID_VALUE;
    return vmm_allocate(ctx->gpu, bytes, base);
}

API CUresult cuMemFree_v2(CUdeviceptr base)
{
    struct context *ctx;
    CUresult r = cuda_current(&ctx);
    if (r || !base)
        return r;
    r = context_wait(ctx); /* cuMemFree synchronises */
    return r ? r : vmm_free(base);
}

API CUresult cuMemAllocAsync(CUdeviceptr *base, size_t bytes, CUstream stream)
{
    return cuMemAlloc_v2(base, bytes);
}

API CUresult cuMemAllocManaged(CUdeviceptr *base, size_t bytes, unsigned flags)
{
    return cuMemAlloc_v2(base, bytes); /* as if it were all resident */
}

API CUresult cuMemAllocFromPoolAsync(CUdeviceptr *base, size_t bytes, void *pool, CUstream stream)
{
    return cuMemAlloc_v2(base, bytes);
}

API CUresult cuMemAllocPitch_v2(CUdeviceptr *base, size_t *pitch, size_t width, size_t height, unsigned element)
{
    *pitch = (width + 511) / 512 * 512;
    return cuMemAlloc_v2(base, *pitch * height);
}

/* An array is a piece of memory; its layout is nobody's business. Formats: of one byte, or float. */
API CUresult cuArrayCreate_v2(CUdeviceptr *array, const struct array_shape *shape)
{
    size_t texel = (shape->format == 0x20 ? 4 : 1) * (size_t)shape->channels;
    return cuMemAlloc_v2(array, shape->width * (shape->height ? shape->height : 1) * texel);
}

API CUresult cuArrayDestroy(CUdeviceptr array)
{
    return cuMemFree_v2(array);
}

API CUresult cuMemFreeAsync(CUdeviceptr base, CUstream stream)
{
    return cuMemFree_v2(base);
}

API CUresult cuMemHostAlloc(void **out, size_t bytes, unsigned flags)
{
    uint64_t *p = mmap(NULL, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *p = bytes + 4096; /* the page in front remembers the size */
    *out = (char *)p + 4096;
    return cuda_ready();
}

API CUresult cuMemAllocHost_v2(void **out, size_t bytes)
{
    return cuMemHostAlloc(out, bytes, 0);
}

API CUresult cuMemFreeHost(void *p)
{
    uint64_t *head = (void *)((char *)p - 4096);
    munmap(head, *head);
    return cuda_ready();
}

API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *device, void *host, unsigned flags)
{
    *device = (uintptr_t)host; /* one address space */
    return cuda_ready();
}

API CUresult cuMemHostRegister_v2(void *p, size_t bytes, unsigned flags)
{
    return cuda_ready();
}

API CUresult cuMemHostUnregister(void *p)
{
    return cuda_ready();
}

static CUresult issue(CUstream stream, int channel, uint32_t op, uint64_t a, uint64_t b, uint64_t c, bool wait)
{
    struct context *ctx;
    struct fakenv_entry e = {.op = op, .arg = {a, b, c}};
    CUresult r = cuda_current(&ctx);
    if (r)
        return r;
    struct stream *s = cuda_stream(ctx, stream);
    r = stream_issue(s, channel < 0 ? s->channel : (unsigned)channel, &e, NULL, 0);
    return r || !wait ? r : stream_wait(s, s->issued);
}

API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes)
{
    return issue(NULL, COPY_IN, OP_COPY, to, (uintptr_t)from, bytes, true);
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream)
{
    return issue(stream, COPY_IN, OP_COPY, to, (uintptr_t)from, bytes, false);
}

API CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes)
{
    return issue(NULL, COPY_OUT, OP_COPY, (uintptr_t)to, from, bytes, true);
}

API CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    return issue(stream, COPY_OUT, OP_COPY, (uintptr_t)to, from, bytes, false);
}

API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes)
{
    return issue(NULL, COPY_IN, OP_COPY, to, from, bytes, true);
}

API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    return issue(stream, COPY_IN, OP_COPY, to, from, bytes, false);
}

API CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes)
{
    return issue(NULL, COPY_IN, OP_COPY, to, from, bytes, true);
}

API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream)
{
    return issue(stream, COPY_IN, OP_COPY, to, from, bytes, false);
}

API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count)
{
    return issue(NULL, -1, OP_FILL8, to, value, count, true);
}

API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream)
{
    return issue(stream, -1, OP_FILL8, to, value, count, false);
}

API CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count)
{
    return issue(NULL, -1, OP_FILL32, to, value, count, true);
}

API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream)
{
    return issue(stream, -1, OP_FILL32, to, value, count, false);
}

API CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr at)
{
    CUdeviceptr found;
    uint64_t size;
    int gpu;
    if (!vmm_find(at, &found, &size, &gpu))
        return CUDA_ERROR_NOT_FOUND;
    if (base)
        *base = found;
    if (bytes)
        *bytes = size;
    return cuda_ready();
}

API CUresult cuPointerGetAttribute(void *out, int attribute, CUdeviceptr at)
{
    CUdeviceptr base;
    uint64_t bytes;
    int gpu;
    if (!vmm_find(at, &base, &bytes, &gpu))
        return CUDA_ERROR_INVALID_VALUE; /* host memory that CUDA does not know */
    switch (attribute) {
    case 2: *(unsigned *)out = MEMORYTYPE_DEVICE; break;
    case 3: *(CUdeviceptr *)out = at; break;
    case 8: *(int *)out = 0; break;
    case 9: *(int *)out = gpu; break;
    case 11: *(CUdeviceptr *)out = base; break;
    case 12: *(size_t *)out = bytes; break;
    case 13: *(int *)out = 1; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
    }
    return cuda_ready();
}
