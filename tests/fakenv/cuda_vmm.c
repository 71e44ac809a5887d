/* SPDX-License-Identifier: Apache-2.0
 *
 * Virtual memory management. A reservation is inaccessible address space and a UVM external range;
 * memory appears in it at cuMemSetAccess, by UVM_MAP_EXTERNAL_ALLOCATION, and not before: a touch
 * of anything else is a fault, on the CPU as in a kernel.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cuda_fake.h"

enum { PINNED = 1, DEVICE_LOCATION = 1, POSIX_FD = 1, ACCESS_NONE = 0, ACCESS_RW = 3 };
typedef struct handle { uint32_t memory; uint64_t bytes; CUmemAllocationProp prop; int refs; } *CUhandle;
struct area { struct area *next; uint64_t base, bytes; CUhandle handle; bool accessible, whole; };

static struct area *reservations, *mappings;
static uint32_t bare_device[FAKENV_MAX_GPUS]; /* memory needs no context */

static uint32_t device_of(int gpu, uint32_t *device)
{
    uint32_t params[14] = {cuda.physical[gpu]};
    uint32_t status = bare_device[gpu] ? NV_OK
                                       : rm_alloc(cuda.client, NV01_DEVICE_0, params, sizeof params, &bare_device[gpu]);
    *device = bare_device[gpu];
    return status;
}

static struct area *holding(struct area *list, uint64_t base, uint64_t bytes)
{
    for (struct area *a = list; a; a = a->next)
        if (base >= a->base && base + bytes <= a->base + a->bytes)
            return a;
    return NULL;
}

static struct area *overlapping(struct area *list, uint64_t base, uint64_t bytes)
{
    for (struct area *a = list; a; a = a->next)
        if (base < a->base + a->bytes && a->base < base + bytes)
            return a;
    return NULL;
}

static struct area *area_add(struct area **list, uint64_t base, uint64_t bytes, CUhandle handle)
{
    struct area *a = calloc(1, sizeof *a);
    if (!a)
        abort();
    *a = (struct area){.next = *list, .base = base, .bytes = bytes, .handle = handle};
    return *list = a;
}

static void area_remove(struct area **list, struct area *area)
{
    for (struct area **at = list; *at; at = &(*at)->next)
        if (*at == area) {
            *at = area->next;
            free(area);
            return;
        }
}

static void handle_put(CUhandle h)
{
    if (--h->refs == 0) {
        rm_free(h->memory);
        free(h);
    }
}

static bool wrong_size(uint64_t base, uint64_t bytes)
{
    return bytes == 0 || bytes % GRANULARITY || base % GRANULARITY;
}

static CUresult reserve(uint64_t bytes, uint64_t alignment, CUdeviceptr *base)
{
    alignment = alignment < GRANULARITY ? GRANULARITY : alignment;
    char *raw = mmap(NULL, bytes + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    uint64_t at = ((uintptr_t)raw + alignment - 1) & ~(alignment - 1);
    munmap(raw, at - (uintptr_t)raw);
    munmap((void *)(uintptr_t)(at + bytes), (uintptr_t)raw + alignment - at);
    uint32_t status = cuda_attach();
    if (!status)
        status = uvm_call(0, UVM_CREATE_EXTERNAL_RANGE, at, bytes);
    if (status) {
        munmap((void *)(uintptr_t)at, bytes);
        return cuda_result(status);
    }
    area_add(&reservations, at, bytes, NULL);
    *base = at;
    return CUDA_SUCCESS;
}

static void unreserve(struct area *area)
{
    uvm_call(0, UVM_FREE, area->base, 0);
    munmap((void *)(uintptr_t)area->base, area->bytes);
    area_remove(&reservations, area);
}

static CUresult create(int gpu, uint64_t bytes, const CUmemAllocationProp *prop, CUhandle *out)
{
    uint32_t device, status;
    CUhandle h = calloc(1, sizeof *h);
    if (!h)
        return CUDA_ERROR_OUT_OF_MEMORY;
    h->bytes = bytes;
    h->prop = *prop;
    h->refs = 1;
    if ((status = device_of(gpu, &device)) || (status = rm_memory(device, bytes, &h->memory))) {
        free(h);
        return cuda_result(status);
    }
    *out = h;
    return CUDA_SUCCESS;
}

/* ---- the public calls ---- */

#define LOCKED(expression)                  \
    do {                                    \
        CUresult r_ = cuda_ready();         \
        if (r_)                             \
            return r_;                      \
        pthread_mutex_lock(&cuda_lock);     \
        r_ = (expression);                  \
        pthread_mutex_unlock(&cuda_lock);   \
        return r_;                          \
    } while (0)

static CUresult prop_ok(const CUmemAllocationProp *p)
{
    return p && p->type == PINNED && p->location.type == DEVICE_LOCATION && p->location.id >= 0 &&
                   (unsigned)p->location.id < cuda.gpus && (p->handle_types & ~POSIX_FD) == 0
               ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop, int option)
{
    *granularity = GRANULARITY;
    return prop_ok(prop);
}

API CUresult cuMemAddressReserve(CUdeviceptr *base, size_t bytes, size_t alignment, CUdeviceptr hint,
                                 unsigned long long flags)
{
    if (wrong_size(0, bytes) || flags || (alignment & (alignment - 1)))
        return CUDA_ERROR_INVALID_VALUE;
    LOCKED(reserve(bytes, alignment, base));
}

static CUresult address_free(CUdeviceptr base, size_t bytes)
{
    struct area *a = holding(reservations, base, bytes);
    if (!a || a->base != base || a->bytes != bytes || overlapping(mappings, base, bytes))
        return CUDA_ERROR_INVALID_VALUE;
    unreserve(a);
    return CUDA_SUCCESS;
}

API CUresult cuMemAddressFree(CUdeviceptr base, size_t bytes)
{
    LOCKED(address_free(base, bytes));
}

API CUresult cuMemCreate(CUhandle *handle, size_t bytes, const CUmemAllocationProp *prop, unsigned long long flags)
{
    if (wrong_size(0, bytes) || flags || cuda_ready() || prop_ok(prop))
        return cuda_ready() ? CUDA_ERROR_NOT_INITIALIZED : CUDA_ERROR_INVALID_VALUE;
    LOCKED(create(prop->location.id, bytes, prop, handle));
}

static CUresult release_locked(CUhandle handle)
{
    handle_put(handle);
    return CUDA_SUCCESS;
}

API CUresult cuMemRelease(CUhandle handle)
{
    if (!handle)
        return CUDA_ERROR_INVALID_VALUE;
    LOCKED(release_locked(handle));
}

static CUresult map_locked(CUdeviceptr base, size_t bytes, CUhandle handle)
{
    if (!holding(reservations, base, bytes) || overlapping(mappings, base, bytes) || bytes > handle->bytes)
        return CUDA_ERROR_INVALID_VALUE;
    handle->refs++;
    area_add(&mappings, base, bytes, handle);
    return CUDA_SUCCESS;
}

API CUresult cuMemMap(CUdeviceptr base, size_t bytes, size_t offset, CUhandle handle, unsigned long long flags)
{
    if (wrong_size(base, bytes) || offset || !handle || flags)
        return CUDA_ERROR_INVALID_VALUE;
    LOCKED(map_locked(base, bytes, handle));
}

static CUresult access_locked(CUdeviceptr base, size_t bytes, int flags)
{
    uint64_t covered = 0;
    for (struct area *a = mappings; a; a = a->next)
        if (a->base >= base && a->base + a->bytes <= base + bytes)
            covered += a->bytes;
    if (covered != bytes)
        return CUDA_ERROR_INVALID_VALUE;
    for (struct area *a = mappings; a; a = a->next) {
        if (a->base < base || a->base + a->bytes > base + bytes)
            continue;
        int gpu = a->handle->prop.location.id;
        uint32_t status = flags == ACCESS_NONE ? uvm_call(gpu, UVM_UNMAP_EXTERNAL, a->base, a->bytes)
                                               : uvm_map(gpu, a->base, a->bytes, 0, a->handle->memory);
        if (status)
            return cuda_result(status);
        a->accessible = flags != ACCESS_NONE;
    }
    return CUDA_SUCCESS;
}

API CUresult cuMemSetAccess(CUdeviceptr base, size_t bytes, const CUmemAccessDesc *desc, size_t count)
{
    if (wrong_size(base, bytes) || count != 1)
        return CUDA_ERROR_INVALID_VALUE; /* one location: peers are not modelled */
    LOCKED(access_locked(base, bytes, desc->flags));
}

API CUresult cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location, CUdeviceptr at)
{
    pthread_mutex_lock(&cuda_lock);
    struct area *a = holding(mappings, at, 1);
    *flags = a && a->accessible ? ACCESS_RW : ACCESS_NONE;
    pthread_mutex_unlock(&cuda_lock);
    return a ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static CUresult unmap_locked(CUdeviceptr base, size_t bytes)
{
    uint64_t covered = 0;
    for (struct area *a = mappings; a; a = a->next)
        if (a->base >= base && a->base + a->bytes <= base + bytes)
            covered += a->bytes;
    if (covered != bytes)
        return CUDA_ERROR_INVALID_VALUE;
    for (struct area *a; (a = overlapping(mappings, base, bytes));) {
        uint32_t status = uvm_call(a->handle->prop.location.id, UVM_UNMAP_EXTERNAL, a->base, a->bytes);
        if (status)
            return cuda_result(status);
        handle_put(a->handle);
        area_remove(&mappings, a);
    }
    return CUDA_SUCCESS;
}

API CUresult cuMemUnmap(CUdeviceptr base, size_t bytes)
{
    struct context *ctx;
    /* The open question of E8: some drivers may wait for the context's work here. */
    if (cuda.shared && atomic_load(&cuda.shared->unmap_syncs) && cuda_current(&ctx) == CUDA_SUCCESS)
        context_wait(ctx);
    if (wrong_size(base, bytes))
        return CUDA_ERROR_INVALID_VALUE;
    LOCKED(unmap_locked(base, bytes));
}

API CUresult cuMemRetainAllocationHandle(CUhandle *handle, void *at)
{
    pthread_mutex_lock(&cuda_lock);
    struct area *a = holding(mappings, (uintptr_t)at, 1);
    if (a)
        (*handle = a->handle)->refs++;
    pthread_mutex_unlock(&cuda_lock);
    return a ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *prop, CUhandle handle)
{
    *prop = handle->prop;
    return cuda_ready();
}

API CUresult cuMemExportToShareableHandle(void *out, CUhandle handle, int type, unsigned long long flags)
{
    struct ctrl_export p = {.object = {1, 0, 0, handle->memory}};
    if (cuda_ready() || type != POSIX_FD || flags || !(handle->prop.handle_types & POSIX_FD))
        return CUDA_ERROR_INVALID_VALUE;
    p.fd = open("/dev/nvidiactl", O_RDWR | O_CLOEXEC);
    uint32_t status = p.fd < 0 ? (uint32_t)NV_ERR_INVALID_STATE
                               : rm_control(cuda.client, CTRL_EXPORT_OBJECT_TO_FD, &p, sizeof p);
    if (status) {
        close(p.fd);
        return cuda_result(status);
    }
    memcpy(out, &p.fd, sizeof p.fd);
    return CUDA_SUCCESS;
}

static CUresult import_locked(CUhandle *handle, int fd)
{
    struct ctrl_import p = {.fd = fd, .object = {.type = 1}};
    uint32_t status = device_of(0, &p.object.parent);
    if (!status)
        status = rm_control(cuda.client, CTRL_IMPORT_OBJECT_FROM_FD, &p, sizeof p);
    if (status)
        return CUDA_ERROR_INVALID_VALUE;
    struct fakenv_size size = {.client = cuda.client, .object = p.object.object};
    rm_ioctl(cuda.ctl_fd, _IOWR('F', FAKENV_ESC_SIZE, struct fakenv_size), &size);
    int ordinal = 0;
    while ((unsigned)ordinal < cuda.gpus && cuda.physical[ordinal] != size.gpu)
        ordinal++;
    if ((unsigned)ordinal == cuda.gpus)
        return CUDA_ERROR_INVALID_DEVICE;
    CUhandle h = calloc(1, sizeof *h);
    if (!h)
        abort();
    *h = (struct handle){.memory = p.object.object, .bytes = size.bytes, .refs = 1,
                         .prop = {.type = PINNED, .handle_types = POSIX_FD, .location = {DEVICE_LOCATION, ordinal}}};
    *handle = h;
    return CUDA_SUCCESS;
}

API CUresult cuMemImportFromShareableHandle(CUhandle *handle, void *os_handle, int type)
{
    if (type != POSIX_FD)
        return CUDA_ERROR_INVALID_VALUE;
    LOCKED(import_locked(handle, (int)(intptr_t)os_handle));
}

/* ---- cuMemAlloc ---- */

static CUresult allocate_locked(int gpu, uint64_t bytes, CUdeviceptr *base)
{
    CUmemAllocationProp prop = {.type = PINNED, .location = {DEVICE_LOCATION, gpu}};
    CUhandle handle;
    bytes = (bytes + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
    CUresult r = create(gpu, bytes, &prop, &handle);
    if (r)
        return r;
    if (!(r = reserve(bytes, GRANULARITY, base)) && !(r = map_locked(*base, bytes, handle))) {
        mappings->whole = true;
        r = access_locked(*base, bytes, ACCESS_RW);
    }
    handle_put(handle); /* the mapping keeps it */
    return r;
}

CUresult vmm_allocate(int gpu, uint64_t bytes, CUdeviceptr *base)
{
    LOCKED(allocate_locked(gpu, bytes, base));
}

static CUresult free_locked(CUdeviceptr base)
{
    struct area *a = holding(mappings, base, 1);
    if (!a || a->base != base || !a->whole)
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t bytes = a->bytes;
    CUresult r = unmap_locked(base, bytes);
    return r ? r : address_free(base, bytes);
}

CUresult vmm_free(CUdeviceptr base)
{
    LOCKED(free_locked(base));
}

bool vmm_find(CUdeviceptr at, CUdeviceptr *base, uint64_t *bytes, int *gpu)
{
    pthread_mutex_lock(&cuda_lock);
    struct area *a = holding(mappings, at, 1);
    if (a)
        *base = a->base, *bytes = a->bytes, *gpu = a->handle->prop.location.id;
    pthread_mutex_unlock(&cuda_lock);
    return a != NULL;
}
