/* SPDX-License-Identifier: Apache-2.0
 *
 * The private seam between the fake driver (supervisor) and the fake libcuda: what a real driver
 * and a real libcuda share through USERD, doorbells and page tables.
 *
 * One *engine* per CUDA process plays the GPU for it. It is a process of its own that shares the
 * address space of the CUDA process (CLONE_VM without CLONE_THREAD): SIGSTOP of the CUDA process
 * does not stop its kernels, exactly as on a GPU, and kernels see the process's virtual addresses.
 * Every channel is a *slot* of the page below, and one thread of the engine. The supervisor writes
 * `run`, the thread answers in `state`; each simulated CTA looks at `run` once.
 *
 * Ordering: thread: state=RUNNING, fence, read run. Supervisor: write run, fence, read state.
 * So once the supervisor has written EVICT and then sees state != RUNNING, no instruction of a
 * kernel of that channel runs until it writes ON again.
 */
#ifndef FAKENV_GPU_H
#define FAKENV_GPU_H
#include <stdatomic.h>
#include <stdint.h>

enum { FAKENV_SLOTS = 512, FAKENV_RING = 64, FAKENV_ARGS = 8 };
enum { FAKENV_COMPUTE = 8, FAKENV_COMPUTE_MAX = 256 }; /* channels of a context's compute group: usual, most */

enum fakenv_run {
    RUN_EVICT = 0, /* stop at the next CTA, take nothing new */
    RUN_ON = 1,
    RUN_DRAIN = 2, /* finish what is resident, take nothing new: masked but not evicted */
};
enum fakenv_state {
    ST_IDLE = 0,
    ST_RUNNING = 1,
    ST_PARKED = 2, /* evicted in the middle of a kernel */
    ST_DEAD = 3,   /* faulted or stopped: takes nothing any more */
};

struct fakenv_entry {
    uint32_t op, ctas;
    uint64_t wait_at[2], wait_for[2]; /* addresses of 64-bit semaphores in the process; 0 = none */
    uint64_t done_at, done_value;
    uint64_t arg[FAKENV_ARGS];
    uint64_t pad;
};
_Static_assert(sizeof(struct fakenv_entry) == 128, "ring entry");

struct fakenv_slot {
    _Atomic uint32_t run;   /* supervisor: enum fakenv_run */
    _Atomic uint32_t state; /* engine: enum fakenv_state; shared futex */
    _Atomic uint32_t bell;  /* counts doorbells and changes of run; shared futex */
    _Atomic uint32_t put;   /* process: entries written */
    _Atomic uint32_t get;   /* engine: entries done; shared futex */
    _Atomic uint32_t evictions;
    _Atomic uint32_t abort; /* supervisor: drop everything; engine answers with 0 */
    _Atomic uint64_t ctas;  /* engine: CTAs executed, ever */
    struct fakenv_entry ring[FAKENV_RING];
};

struct fakenv_shared {
    _Atomic uint32_t xid;        /* engine: 31 after a fault of a kernel */
    _Atomic uint32_t lost;       /* supervisor: the GPU fell off the bus */
    _Atomic uint32_t unmap_syncs;/* supervisor: cuMemUnmap waits for the context first (E8's bad case) */
    uint32_t pad;
    _Atomic uint64_t fault_address;
    struct fakenv_slot slot[FAKENV_SLOTS];
};

/* Commands from the supervisor to the engine (SEQPACKET; MAP carries the memory as SCM_RIGHTS). */
enum { ENGINE_START_SLOT = 1, ENGINE_MAP, ENGINE_SPARSE, ENGINE_UNMAP };
struct engine_command { uint32_t op, slot; uint64_t base, length, offset; };
struct engine_answer { int32_t error; };

/* Private ioctls ('F', numbers no real driver uses). */
enum { FAKENV_ESC_ATTACH = 0xf0, FAKENV_ESC_QUERY = 0xf1, FAKENV_ESC_SIZE = 0xf2 };
struct fakenv_size { uint32_t client, object, gpu, pad; uint64_t bytes; }; /* 0 bytes: no such memory */
struct fakenv_attach { /* on the UVM file; fills in the two descriptors */
    int32_t shared_fd, command_fd;
    uint32_t status, pad;
};
enum { FAKENV_MAX_PROCESSES = 64, FAKENV_MAX_GPUS = 8 };
struct fakenv_query { /* on any control file: what NVML and cuMemGetInfo need */
    uint32_t gpu, status;
    uint32_t gpus, lost;
    uint64_t total_bytes, used_bytes;
    uint32_t process_count, xid;
    uint64_t xid_count;
    uint32_t running;          /* channels with a kernel on the GPU right now */
    uint32_t compute_channels; /* of a context that is made now */
    struct { uint32_t pid, pad; uint64_t used_bytes; } process[FAKENV_MAX_PROCESSES];
    char version[64], name[64], branch[8];
    uint8_t uuid[16];
};

#endif
