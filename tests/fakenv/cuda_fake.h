/* SPDX-License-Identifier: Apache-2.0
 *
 * Inside the fake libcuda: the driver API over the fake device, reached by the same ioctls as a
 * real libcuda uses. Only documented functions; the types below mirror the public ABI.
 *
 * Threads: any. `cuda_lock` guards contexts, allocations and handles; a stream's own lock keeps
 * issue order; a channel's lock keeps its ring. Locks are taken in that order.
 */
#ifndef FAKENV_CUDA_FAKE_H
#define FAKENV_CUDA_FAKE_H
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "abi.h"
#include "branch.h"
#include "gpu.h"

#define API __attribute__((visibility("default")))

typedef enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_MAP_FAILED = 205,
    CUDA_ERROR_OPERATING_SYSTEM = 304,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803,
    CUDA_ERROR_UNKNOWN = 999,
} CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef struct context *CUcontext;
typedef struct stream *CUstream;
typedef struct event *CUevent;
typedef struct { int type, id; } CUmemLocation;
typedef struct {
    int type, handle_types;
    CUmemLocation location;
    void *win32;
    uint8_t compression, rdma;
    uint16_t usage;
    uint8_t reserved[4];
} CUmemAllocationProp;
typedef struct { CUmemLocation location; int flags; } CUmemAccessDesc;
typedef struct { unsigned grid[3], block[3], shared; CUstream stream; void *attributes; unsigned count; } CUlaunchConfig;
_Static_assert(sizeof(CUmemAllocationProp) == 32 && sizeof(CUmemAccessDesc) == 12, "public ABI");

enum { COPY_ENGINES = 2, CONTEXT_CHANNELS = FAKENV_COMPUTE_MAX + COPY_ENGINES };
enum { GRANULARITY = 2 << 20, ATTACH_MAX = 16 };

struct ring { unsigned slot; pthread_mutex_t lock; uint32_t handle; };

struct stream {
    struct context *ctx;
    unsigned channel;        /* which of the context's compute channels */
    int priority;
    pthread_mutex_t lock;
    uint64_t issued;
    _Atomic uint64_t done;   /* written by the engine; shared futex on its low half */
    struct stream *next;
};
struct event { struct stream *stream; uint64_t value; uint64_t *stamp_ns; };

struct context {
    int gpu, refs;
    uint32_t device, subdevice, vaspace, gr_tsg, ce_tsg[COPY_ENGINES];
    struct ring ring[CONTEXT_CHANNELS]; /* compute from 0 on; copy from FAKENV_COMPUTE_MAX on */
    struct stream null_stream, *streams;
    unsigned compute_channels, next_channel;
};

/* One process's view of the driver. */
extern struct cuda {
    bool initialized;
    pid_t pid;
    int ctl_fd, uvm_fd, gpu_fd[FAKENV_MAX_GPUS];
    uint32_t client;
    const struct branch *branch;
    struct fakenv_query info[FAKENV_MAX_GPUS]; /* by ordinal */
    unsigned physical[FAKENV_MAX_GPUS];        /* ordinal -> the machine's number: CUDA_VISIBLE_DEVICES */
    unsigned gpus;
    struct fakenv_shared *shared; /* NULL until the first context */
    struct context *primary[FAKENV_MAX_GPUS];
} cuda;
extern pthread_mutex_t cuda_lock;

/* cuda_rm.c: 0 or an NV_STATUS; ioctl failures are NV_ERR_INVALID_STATE */
uint32_t rm_connect(void);
uint32_t rm_alloc(uint32_t parent, uint32_t hclass, void *params, uint32_t size, uint32_t *handle);
uint32_t rm_control(uint32_t object, uint32_t cmd, void *params, uint32_t size);
void rm_free(uint32_t object);
uint32_t rm_memory(uint32_t device, uint64_t bytes, uint32_t *handle);
uint32_t rm_query(int gpu, struct fakenv_query *query);
int rm_ioctl(int fd, unsigned long command, void *params);
uint32_t uvm_map(int gpu, uint64_t base, uint64_t length, uint64_t offset, uint32_t memory);
uint32_t uvm_call(int gpu, unsigned long command, uint64_t base, uint64_t length);
CUresult cuda_result(uint32_t status);

/* cuda_engine.c: starts the process that plays the GPU; it ends when `command_fd`'s peer closes. */
int engine_start(struct fakenv_shared *shared, int command_fd);

/* cuda_kernels.c */
struct worker;
struct kernel { const char *name; unsigned args; void (*run)(struct worker *, const struct fakenv_entry *); };
extern const struct kernel kernels[];
extern const unsigned kernel_count;
enum { OP_NOP, OP_COPY, OP_FILL8, OP_FILL32, OP_STORE32, OP_WAIT32, OP_STAMP, OP_KERNELS };
/* To be called at least once per simulated CTA: the point where a channel can be evicted. */
void cta(struct worker *w);

/* cuda_device.c */
CUresult cuda_ready(void);
/* The current context, or the reason why there is none. */
CUresult cuda_current(struct context **ctx);
struct stream *cuda_stream(struct context *ctx, CUstream stream);

/* Opens UVM and starts the engine, once; cuda_lock held. */
uint32_t cuda_attach(void);

/* cuda_vmm.c: device memory at its own address (cuMemAlloc), over the same calls as VMM */
CUresult vmm_allocate(int gpu, uint64_t bytes, CUdeviceptr *base);
CUresult vmm_free(CUdeviceptr base);
/* The mapping that holds `at`, or false. */
bool vmm_find(CUdeviceptr at, CUdeviceptr *base, uint64_t *bytes, int *gpu);

/* cuda_stream.c: issues one operation in stream order on a compute channel or copy engine */
CUresult stream_issue(struct stream *stream, unsigned channel, const struct fakenv_entry *op,
                      const struct stream *after, uint64_t after_value);
CUresult stream_wait(struct stream *stream, uint64_t value);
CUresult context_wait(struct context *ctx);
CUresult context_error(void);
void stream_init(struct stream *stream, struct context *ctx, unsigned channel);

#endif
