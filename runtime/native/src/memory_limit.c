/* SPDX-License-Identifier: Apache-2.0
 *
 * An offline process may not allocate more device memory than its tenant was given.  Every
 * entry point of the CUDA driver API that allocates is wrapped: what would go over the limit
 * (the agent's word in the page) gets CUDA_ERROR_OUT_OF_MEMORY, as on a smaller GPU; and
 * cuMemGetInfo, cuDeviceTotalMem and NVML's memory info tell of that smaller GPU, so all three
 * agree.  A process that finds a way around this is seen by the agent, in NVML.
 *
 * Charged: what is asked for, until it is freed; a cuMemCreate allocation until its handle is
 * released and nothing is mapped any more; what libvalve itself maps (the arena) by the slab.
 * Not charged here: contexts, modules, graphs' own nodes, memory imported from others.
 *
 * Threads: any of the process's own.  `lock` guards the table of allocations.
 */
#include "gpu.h"
#include "memory_limit.h"
#include "slab.h"
#include "state.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define WRAPPERS 64
#define BUCKETS 4096
#define OUT_OF_MEMORY 2
#define ON_DEVICE 1

/* Six at most. */
#define PARAMETERS long a, long b, long c, long d, long e, long f
#define ARGUMENTS a, b, c, d, e, f
typedef int entry_point(PARAMETERS);

enum kind {
    NONE, ALLOC, PITCH, CREATE, ARRAY, ARRAY3D, MIPMAP, FREE, FREE_ARRAY, FREE_MIPMAP, RELEASE, RETAIN, MAP, UNMAP,
    RESET, INFO, TOTAL, NVML_INFO, NVML_INFO2,
};

static const struct {
    const char *name; /* without _v2, _ptsz and the like */
    enum kind kind;
} NAMES[] = {
    {"cuMemAlloc", ALLOC}, {"cuMemAllocManaged", ALLOC}, {"cuMemAllocAsync", ALLOC}, {"cuMemAllocFromPoolAsync", ALLOC},
    {"cuMemAllocPitch", PITCH}, {"cuMemCreate", CREATE}, {"cuArrayCreate", ARRAY}, {"cuArray3DCreate", ARRAY3D},
    {"cuMipmappedArrayCreate", MIPMAP}, {"cuMemFree", FREE}, {"cuMemFreeAsync", FREE}, {"cuArrayDestroy", FREE_ARRAY},
    {"cuMipmappedArrayDestroy", FREE_MIPMAP}, {"cuMemRelease", RELEASE}, {"cuMemRetainAllocationHandle", RETAIN},
    {"cuMemImportFromShareableHandle", RETAIN}, {"cuMemMap", MAP}, {"cuMemUnmap", UNMAP}, {"cuMemGetInfo", INFO},
    {"cuDevicePrimaryCtxReset", RESET},
    {"cuDeviceTotalMem", TOTAL}, {"nvmlDeviceGetMemoryInfo", NVML_INFO}, {"nvmlDeviceGetMemoryInfo_v2", NVML_INFO2},
};

/* Public ABI of CUDA and NVML, as far as it is looked at. */
struct cuda_array { size_t width, height; uint32_t format, channels; };
struct cuda_array3d { size_t width, height, depth; uint32_t format, channels, flags; };
struct cuda_prop { int type, handle_types, location_type, location_id; };
struct nvml_memory { uint64_t total, free, used; };
struct nvml_memory2 { uint32_t version; uint64_t total, reserved, free, used; };

static struct allocation {
    struct allocation *next;
    uint64_t key, bytes;
    enum kind kind;     /* which key it is: ALLOC an address, CREATE a handle, ARRAY, MIPMAP, MAP an address */
    uint32_t refs;      /* CREATE: handles and mappings of it */
    uint64_t of;        /* MAP: the handle */
} *table[BUCKETS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint64_t used_bytes;

uint64_t memory_limit_used(void) { return atomic_load(&used_bytes); }

static void publish(void)
{
    uint64_t value;
    do {
        value = atomic_load(&used_bytes);
        __atomic_store_n(&valve_page_memory.direct_bytes, value, __ATOMIC_SEQ_CST);
    } while (atomic_load(&used_bytes) != value);
}

static uint64_t limit(void) { return __atomic_load_n(&valve_page_memory.memory_limit_bytes, __ATOMIC_SEQ_CST); }

static uint64_t arena_bytes(void)
{
    uint64_t held = 0;
    if (atomic_load(&valve.arena) != ARENA_READY)
        return 0;
    for (uint32_t i = 0; i < valve.slabs; i++)
        held += (atomic_load(&valve.slab[i]) & SLAB_ACTUAL) != 0;
    return held * valve.slab_bytes;
}

static int charge(uint64_t bytes)
{
    static _Atomic int told;
    uint64_t most = limit(), arena = most ? arena_bytes() : 0, before = atomic_load(&used_bytes);
    do {
        if (most && (bytes > most || before + arena > most - bytes)) {
            char asked[24], allowed[24];
            if (!atomic_exchange(&told, 1))
                VALVE_SAY("an allocation of ", valve_decimal(bytes >> 20, asked), " MiB of GPU memory is refused: this "
                          "tenant may have ", valve_decimal(most >> 20, allowed), " MiB in all");
            return 0;
        }
    } while (!atomic_compare_exchange_weak(&used_bytes, &before, before + bytes));
    publish();
    return 1;
}

static void uncharge(uint64_t bytes)
{
    atomic_fetch_sub(&used_bytes, bytes);
    publish();
}

/* ---- the table ---- */

static struct allocation **place(enum kind kind, uint64_t key)
{
    struct allocation **at = &table[((key >> 9) ^ (key >> 21) ^ key) % BUCKETS];
    while (*at && ((*at)->key != key || (*at)->kind != kind))
        at = &(*at)->next;
    return at;
}

static void remember(enum kind kind, uint64_t key, uint64_t bytes, uint64_t of)
{
    pthread_mutex_lock(&lock);
    struct allocation **at = place(kind, key), *known = *at;
    if (known == NULL && (known = calloc(1, sizeof *known)) != NULL) {
        *known = (struct allocation){.key = key, .kind = kind, .bytes = bytes, .of = of};
        *at = known;
    }
    if (known)
        known->refs++;
    pthread_mutex_unlock(&lock);
}

/* One reference less; with the last one the charge goes.  `lock` is held. */
static void forget(enum kind kind, uint64_t key)
{
    struct allocation **at = place(kind, key), *gone = *at;
    if (gone == NULL || --gone->refs != 0)
        return;
    *at = gone->next;
    if (kind != MAP)
        uncharge(gone->bytes);
    free(gone);
}

static int is_known(enum kind kind, uint64_t key)
{
    pthread_mutex_lock(&lock);
    int known = *place(kind, key) != NULL;
    pthread_mutex_unlock(&lock);
    return known;
}

/* All that ends with its context. */
static void forget_contexts(void)
{
    pthread_mutex_lock(&lock);
    for (int n = 0; n < BUCKETS; n++)
        for (struct allocation **at = &table[n], *gone; (gone = *at) != NULL;) {
            if (gone->kind != ALLOC && gone->kind != ARRAY && gone->kind != MIPMAP) {
                at = &gone->next;
                continue;
            }
            *at = gone->next;
            uncharge(gone->bytes);
            free(gone);
        }
    pthread_mutex_unlock(&lock);
}

static void forget_mappings(uint64_t base, uint64_t bytes)
{
    pthread_mutex_lock(&lock);
    for (int n = 0; n < BUCKETS; n++)
        for (struct allocation *at = table[n], *next; at; at = next) {
            next = at->next;
            if (at->kind != MAP || at->key < base || at->key - base >= bytes)
                continue;
            uint64_t handle = at->of, key = at->key;
            forget(MAP, key);
            forget(CREATE, handle);
            at = NULL;
            next = table[n]; /* the bucket has changed: look at it anew */
        }
    pthread_mutex_unlock(&lock);
}

/* ---- what is done around each kind of call ---- */

static uint64_t texels(size_t width, size_t height, size_t depth, uint32_t format, uint32_t channels)
{
    static const struct { uint32_t format, bytes; } SIZES[] = {{1, 1}, {2, 2}, {3, 4}, {8, 1}, {9, 2}, {10, 4}, {16, 2}, {32, 4}};
    uint64_t texel = 16; /* formats that we do not know are at most so large */
    for (unsigned i = 0; i < sizeof SIZES / sizeof SIZES[0]; i++)
        if (SIZES[i].format == format)
            texel = (uint64_t)SIZES[i].bytes * channels;
    return width * (height ? height : 1) * (depth ? depth : 1) * texel;
}

static uint64_t wanted(enum kind kind, PARAMETERS)
{
    const struct cuda_array *flat = (void *)b;
    const struct cuda_array3d *deep = (void *)b;
    const struct cuda_prop *prop = (void *)c;
    (void)a, (void)e, (void)f;
    switch (kind) {
    case ALLOC: return (uint64_t)b;
    case PITCH: return (((uint64_t)c + 511) & ~511ull) * (uint64_t)d; /* pitches are multiples of 512 */
    case CREATE: return prop && prop->location_type == ON_DEVICE ? (uint64_t)b : 0;
    case ARRAY: return flat ? texels(flat->width, flat->height, 0, flat->format, flat->channels) : 0;
    case ARRAY3D: return deep ? texels(deep->width, deep->height, deep->depth, deep->format, deep->channels) : 0;
    case MIPMAP: /* each level has at most half of the one before */
        return deep ? 2 * texels(deep->width, deep->height, deep->depth, deep->format, deep->channels) : 0;
    default: return 0;
    }
}

static int allocate(enum kind kind, entry_point *real, PARAMETERS)
{
    uint64_t bytes = wanted(kind, ARGUMENTS);
    if (!charge(bytes))
        return OUT_OF_MEMORY;
    int result = real(ARGUMENTS);
    if (result != 0 || a == 0)
        uncharge(bytes);
    else
        remember(kind == PITCH ? ALLOC : kind == ARRAY3D ? ARRAY : kind, *(uint64_t *)a, bytes, 0);
    return result;
}

static int release(enum kind key, entry_point *real, PARAMETERS)
{
    /* Forgotten before the call: the address or handle may be another allocation's when it returns. */
    pthread_mutex_lock(&lock);
    const struct allocation *at = *place(key, (uint64_t)a);
    int known = at != NULL;
    uint64_t bytes = known ? at->bytes : 0;
    forget(key, (uint64_t)a);
    pthread_mutex_unlock(&lock);
    int result = real(ARGUMENTS);
    if (result == 0 || !known)
        return result;
    int is_gone = !is_known(key, (uint64_t)a);
    if (is_gone) { /* it is still there */
        atomic_fetch_add(&used_bytes, bytes);
        publish();
    }
    if (is_gone || key == CREATE) /* which others may refer to */
        remember(key, (uint64_t)a, bytes, 0);
    return result;
}

/* The GPU as this tenant is to see it. */
static void narrow(uint64_t *total, uint64_t *free_bytes, uint64_t *used)
{
    uint64_t most = limit(), have = atomic_load(&used_bytes) + arena_bytes();
    if (most == 0 || most > *total)
        return;
    uint64_t left = have < most ? most - have : 0;
    *total = most;
    *free_bytes = *free_bytes < left ? *free_bytes : left;
    *used = most - *free_bytes;
}

static int inform(enum kind kind, entry_point *real, PARAMETERS)
{
    uint64_t none = 0;
    int result = real(ARGUMENTS);
    if (result != 0)
        return result;
    if (kind == INFO && a && b)
        narrow((uint64_t *)b, (uint64_t *)a, &none);
    else if (kind == TOTAL && a && limit() && limit() < *(uint64_t *)a)
        *(uint64_t *)a = limit();
    else if (kind == NVML_INFO && b)
        narrow(&((struct nvml_memory *)b)->total, &((struct nvml_memory *)b)->free, &((struct nvml_memory *)b)->used);
    else if (kind == NVML_INFO2 && b)
        narrow(&((struct nvml_memory2 *)b)->total, &((struct nvml_memory2 *)b)->free, &((struct nvml_memory2 *)b)->used);
    return result;
}

static int run(enum kind kind, entry_point *real, PARAMETERS)
{
    int result;
    switch (kind) {
    case ALLOC: case PITCH: case CREATE: case ARRAY: case ARRAY3D: case MIPMAP:
        return allocate(kind, real, ARGUMENTS);
    case FREE: return release(ALLOC, real, ARGUMENTS);
    case FREE_ARRAY: return release(ARRAY, real, ARGUMENTS);
    case FREE_MIPMAP: return release(MIPMAP, real, ARGUMENTS);
    case RELEASE: return release(CREATE, real, ARGUMENTS);
    case RETAIN: /* another reference, where it is one of ours */
        if ((result = real(ARGUMENTS)) == 0 && a && is_known(CREATE, *(uint64_t *)a))
            remember(CREATE, *(uint64_t *)a, 0, 0);
        return result;
    case MAP:
        if ((result = real(ARGUMENTS)) == 0 && is_known(CREATE, (uint64_t)d)) {
            remember(CREATE, (uint64_t)d, 0, 0);
            remember(MAP, (uint64_t)a, (uint64_t)b, (uint64_t)d);
        }
        return result;
    case UNMAP:
        if ((result = real(ARGUMENTS)) == 0)
            forget_mappings((uint64_t)a, (uint64_t)b);
        return result;
    case RESET: /* frees what was allocated, without a call that we would see */
        if ((result = real(ARGUMENTS)) == 0)
            forget_contexts();
        return result;
    default: return inform(kind, real, ARGUMENTS);
    }
}

/* ---- wrappers: numbered, since a name has several real functions behind it ---- */

static struct {
    entry_point *real;
    enum kind kind;
} wrapped[WRAPPERS];

static int through(uint32_t number, PARAMETERS)
{
    static __thread int depth __attribute__((tls_model("initial-exec"))); /* libcuda calls one from another */
    if (depth)
        return wrapped[number].real(ARGUMENTS);
    depth = 1;
    int result = run(wrapped[number].kind, wrapped[number].real, ARGUMENTS);
    depth = 0;
    return result;
}

#include "numbered.h"

static enum kind kind_of(const char *name)
{
    static const char *const SUFFIXES[] = {"", "_v2", "_v3", "_ptsz", "_v2_ptsz", "_ptds"};
    if (strncmp(name, "cu", 2) != 0 && strncmp(name, "nvml", 4) != 0)
        return NONE;
    for (unsigned i = sizeof NAMES / sizeof NAMES[0]; i-- > 0;) { /* NVML's _v2 before its first version */
        size_t length = strlen(NAMES[i].name);
        if (strncmp(name, NAMES[i].name, length) != 0)
            continue;
        for (unsigned s = 0; s < sizeof SUFFIXES / sizeof SUFFIXES[0]; s++)
            if (strcmp(name + length, SUFFIXES[s]) == 0)
                return NAMES[i].kind;
    }
    return NONE;
}

int memory_limit_wants(const char *name, int is_symbol)
{
    static const char *const OLD[] = {"cuMemAlloc", "cuMemFree", "cuMemAllocPitch", "cuMemGetInfo", "cuDeviceTotalMem",
                                      "cuArrayCreate", "cuArray3DCreate"};
    for (unsigned i = 0; is_symbol && i < sizeof OLD / sizeof OLD[0]; i++)
        if (strcmp(name, OLD[i]) == 0)
            return 0;
    return kind_of(name) != NONE;
}

void *memory_limit_wrap(const char *name, void *real)
{
    void *result = real;
    pthread_mutex_lock(&lock);
    for (int n = 0; n < WRAPPERS; n++) {
        if (wrappers[n] == (entry_point *)real)
            break; /* it is one of ours */
        if (wrapped[n].real != NULL && wrapped[n].real != (entry_point *)real)
            continue;
        wrapped[n].kind = kind_of(name);
        wrapped[n].real = (entry_point *)real;
        result = (void *)wrappers[n];
        break;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
/* For programs linked against libcuda, and for a libcuda that calls itself by name. */
static void *behind(const char *name)
{
    void *real = gpu_real_dlsym(RTLD_NEXT, name);
    void *library = real ? NULL : dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return library ? gpu_real_dlsym(library, name) : real;
}

#define LINKED(name)                                                                                     \
    VALVE_API int name(PARAMETERS);                                                                      \
    VALVE_API int name(PARAMETERS)                                                                       \
    {                                                                                                    \
        static entry_point *found;                                                                       \
        entry_point *go = __atomic_load_n(&found, __ATOMIC_SEQ_CST);                                     \
        if (go == NULL) {                                                                                \
            void *real = behind(#name);                                                                  \
            if (real == NULL)                                                                            \
                return 500; /* CUDA_ERROR_NOT_FOUND */                                                   \
            go = gpu_on() ? (entry_point *)memory_limit_wrap(#name, real) : (entry_point *)real;         \
            __atomic_store_n(&found, go, __ATOMIC_SEQ_CST);                                              \
        }                                                                                                \
        return go(ARGUMENTS);                                                                            \
    }
LINKED(cuMemAlloc_v2)
LINKED(cuMemAllocManaged)
LINKED(cuMemAllocAsync)
LINKED(cuMemAllocAsync_ptsz)
LINKED(cuMemAllocFromPoolAsync)
LINKED(cuMemAllocFromPoolAsync_ptsz)
LINKED(cuMemAllocPitch_v2)
LINKED(cuMemCreate)
LINKED(cuArrayCreate_v2)
LINKED(cuArray3DCreate_v2)
LINKED(cuMipmappedArrayCreate)
LINKED(cuMemFree_v2)
LINKED(cuMemFreeAsync)
LINKED(cuMemFreeAsync_ptsz)
LINKED(cuArrayDestroy)
LINKED(cuMipmappedArrayDestroy)
LINKED(cuMemRelease)
LINKED(cuMemRetainAllocationHandle)
LINKED(cuMemImportFromShareableHandle)
LINKED(cuMemMap)
LINKED(cuMemUnmap)
LINKED(cuDevicePrimaryCtxReset)
LINKED(cuDevicePrimaryCtxReset_v2)
LINKED(cuMemGetInfo_v2)
LINKED(cuDeviceTotalMem_v2)
#endif

void memory_limit_forked(void)
{
    pthread_mutex_init(&lock, NULL);
    memset(table, 0, sizeof table);
    atomic_store(&used_bytes, 0);
}
