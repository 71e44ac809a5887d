/* SPDX-License-Identifier: Apache-2.0
 *
 * The wire protocol between the node agent and the runtime in a pod: the one
 * place where it is written down.  `node_agent/valve_agent/wire.py` mirrors it;
 * tests/native/test_wire.py compares every size and offset.
 *
 * Transport: a Unix SOCK_SEQPACKET socket.  One frame is one packet; a frame is
 * a header and a body of the fixed size that belongs to its type.  A packet of
 * any other size, an unknown type or a wrong magic is a protocol error: the
 * receiver says so (VALVE_REJECT from the agent) and closes the connection.
 * Descriptors travel as SCM_RIGHTS beside the frame that names them.
 *
 * All integers are little-endian and naturally aligned; no struct has padding
 * that is not named.  Clocks are CLOCK_MONOTONIC nanoseconds.
 */
#ifndef VALVE_PROTOCOL_H
#define VALVE_PROTOCOL_H

#include <stdint.h>

#define VALVE_MAGIC 0x564c4156u /* "VALV" */
#define VALVE_VERSION_MIN 1u    /* oldest protocol version this side speaks */
#define VALVE_VERSION_MAX 2u    /* newest; 2 added the GPU frames */

#define VALVE_SLABS_MAX 4096u /* slabs in one arena */
#define VALVE_BITMAP_WORDS (VALVE_SLABS_MAX / 64u)
#define VALVE_REQUESTS_MAX 1024u /* requests in one ownership ledger */
#define VALVE_TEXT_BYTES 240u
#define VALVE_NAME_BYTES 64u

enum valve_role { VALVE_ROLE_NONE = 0, VALVE_ROLE_ONLINE = 1, VALVE_ROLE_OFFLINE = 2 };
enum valve_device { VALVE_DEVICE_CPU = 1, VALVE_DEVICE_NVIDIA = 2 };

enum valve_type {
    VALVE_HELLO = 1,         /* runtime -> agent: first frame of a connection          */
    VALVE_WELCOME = 2,       /* agent -> runtime: fds {page, doorbell}                 */
    VALVE_REJECT = 3,        /* agent -> either: a sentence; the connection closes     */
    VALVE_ARENA_OPEN = 4,    /* runtime -> agent: give me an arena                     */
    VALVE_ARENA = 5,         /* agent -> runtime: fds {arena, quarantine, ledger}      */
    VALVE_ARENA_RESTORE = 6, /* runtime -> agent: what I hold; fds {arena, quarantine, ledger} */
    VALVE_WANT = 7,          /* runtime -> agent: I would use this many slabs in all   */
    VALVE_GRANT = 8,         /* agent -> runtime: these slabs are yours, map them      */
    VALVE_RECLAIM = 9,       /* agent -> runtime: remap these to quarantine now        */
    VALVE_RECLAIMED = 10,    /* runtime -> agent: done                                 */
    VALVE_RETURN = 11,       /* runtime -> agent: these slabs are remapped, take them  */
    VALVE_TENANT = 12,       /* launcher -> agent: my descendants are this tenant      */
    VALVE_TENANT_OK = 13,    /* agent -> launcher                                      */
    VALVE_DENIED = 14,       /* agent -> runtime: ARENA_OPEN refused; connection lives */
    VALVE_GPU_TABLE = 15,    /* offline runtime -> agent, after a WELCOME to an nvidia device: fds {table, bell} */
    VALVE_GPU_FILE = 16,     /* offline runtime -> agent: fd {file}: a driver file that this process uses */
    VALVE_GPU_FILE_GONE = 17, /* offline runtime -> agent: it has closed that file; the agent must too */
    /* 32..: the memory connection of a process on a GPU; see valve_memory_open */
    VALVE_MEMORY_OPEN = 32,       /* runtime -> agent: first frame of a memory connection    */
    VALVE_MEMORY = 33,            /* agent -> runtime: fd {quarantine}                       */
    VALVE_MEMORY_MAPPED = 34,     /* runtime -> agent: where it lies; fds {uvm, ...}         */
    VALVE_MEMORY_READY = 35,      /* agent -> runtime: who remaps from here on               */
    VALVE_MEMORY_MAP = 36,        /* agent -> runtime: map these now; one fd per slab        */
    VALVE_MEMORY_QUARANTINE = 37, /* agent -> runtime: map quarantine there now              */
    VALVE_MEMORY_DONE = 38,       /* runtime -> agent: what became of the last two           */
};

enum valve_reject_code {
    VALVE_EPROTO = 1,    /* malformed frame                                    */
    VALVE_EVERSION = 2,  /* no protocol version in common                      */
    VALVE_EIDENTITY = 3, /* the peer belongs to no tenant this agent knows     */
    VALVE_EROLE = 4,     /* the peer claims a role its tenant does not have    */
    VALVE_EARENA = 5,    /* arena larger than the tenant's limit or the device */
    VALVE_EPERM = 6,     /* the peer may not register tenants                  */
};

struct valve_header {
    uint32_t magic;   /* VALVE_MAGIC */
    uint16_t version; /* negotiated: the newest that both speak; in HELLO, TENANT: the sender's newest */
    uint16_t type;    /* enum valve_type */
    uint32_t size;    /* bytes of the whole frame, this header included */
    uint32_t seq;     /* sender's counter, for logs */
};

/* A slab set: bit i of word i/64 is slab i of the tenant's arena. */
struct valve_bitmap {
    uint64_t words[VALVE_BITMAP_WORDS];
};

struct valve_hello {
    struct valve_header header;
    uint16_t version_min;
    uint16_t version_max;
    uint32_t role_claimed; /* enum valve_role: what the process was told it is */
    uint32_t main_pid;     /* thread-group id of the engine process in its own pid namespace */
    uint32_t flags;        /* VALVE_HELLO_* */
    uint64_t arena_slabs;  /* slabs of an arena it already has: ARENA_RESTORE follows; else 0 */
    char library[32];      /* version of libvalve, NUL padded */
    char comm[16];         /* /proc/self/comm, NUL padded */
};
#define VALVE_HELLO_HELPER 1u /* the peer is the address-space helper, a child of main_pid */
#define VALVE_HELLO_BARRIER 2u /* main_pid registered for MEMBARRIER_CMD_GLOBAL_EXPEDITED */

struct valve_welcome {
    struct valve_header header;
    uint32_t role;   /* enum valve_role, as the agent knows it */
    uint32_t device; /* enum valve_device */
    uint64_t tenant; /* the agent's id of the tenant, for logs */
    uint64_t slab_bytes;
    uint32_t slabs_limit; /* most slabs this tenant may ever hold */
    uint32_t lease_ms;    /* an offline runtime pauses itself when the heartbeat is older */
};

struct valve_reject {
    struct valve_header header;
    uint32_t code; /* enum valve_reject_code */
    uint32_t reserved;
    char text[VALVE_TEXT_BYTES]; /* a sentence that says what to do, NUL padded */
};

struct valve_arena_open {
    struct valve_header header;
    uint64_t slabs; /* address space wanted, in slabs; nothing is mapped yet */
};

struct valve_arena {
    struct valve_header header;
    uint64_t slabs;
    uint64_t slab_bytes;
    uint64_t quarantine_bytes; /* divides slab_bytes */
    uint64_t ledger_bytes;
};

struct valve_arena_restore {
    struct valve_header header;
    uint64_t slabs;
    struct valve_bitmap held;
};

struct valve_want {
    struct valve_header header;
    uint32_t total;  /* slabs in all, held ones included */
    uint32_t urgent; /* 1: online, requests are waiting for it */
};

/* GRANT, RECLAIM, RECLAIMED and RETURN share one body. */
struct valve_slabs {
    struct valve_header header;
    uint64_t id; /* RECLAIM: the operation; RECLAIMED repeats it; else 0 */
    uint64_t at_ns;
    struct valve_bitmap set;
};

/* On a GPU the arena is device memory, which only a thread with a CUDA context can reserve: the
 * engine's own.  It opens a second connection, the memory connection, whose peer (SO_PEERCRED) must
 * be a process that said HELLO:
 *
 *   MEMORY_OPEN -> MEMORY | DENIED;  reserve, map quarantine everywhere;  MEMORY_MAPPED -> MEMORY_READY | DENIED
 *
 * and then ARENA_OPEN on the ordinary connection, whose ARENA brings {uvm, quarantine, ledger}. */
struct valve_memory_open {
    struct valve_header header;
    uint64_t slabs;
    uint8_t gpu[16]; /* UUID of the GPU of the thread's context */
};

struct valve_memory {
    struct valve_header header;
    uint64_t slabs;
    uint64_t slab_bytes;
    uint64_t quarantine_bytes; /* size of the quarantine allocation: one slab */
};

struct valve_memory_mapped {
    struct valve_header header;
    uint64_t base;
    uint64_t slabs;
};

enum valve_memory_route {
    VALVE_MEMORY_BY_AGENT = 1,  /* through the process's UVM file: nothing more comes here */
    VALVE_MEMORY_BY_TENANT = 2, /* through libcuda: MAP and QUARANTINE come here */
};

struct valve_memory_ready {
    struct valve_header header;
    uint32_t route; /* enum valve_memory_route */
    uint32_t reserved;
};

#define VALVE_MEMORY_BATCH 3u
struct valve_memory_map {
    struct valve_header header;
    uint64_t id;
    uint32_t count; /* slabs, and descriptors */
    uint32_t slab[VALVE_MEMORY_BATCH];
};

struct valve_memory_quarantine {
    struct valve_header header;
    uint64_t id;
    struct valve_bitmap set;
};

struct valve_memory_done {
    struct valve_header header;
    uint64_t id;
    uint32_t result; /* 0, or the CUresult of what failed: nothing may run any more */
    uint32_t reserved;
};

struct valve_tenant {
    struct valve_header header;
    uint16_t version_min;
    uint16_t version_max;
    uint32_t role;         /* enum valve_role */
    uint64_t memory_bytes; /* offline: most device memory; 0: the policy's default */
    char name[VALVE_NAME_BYTES];
};

struct valve_tenant_ok {
    struct valve_header header;
    uint64_t tenant;
    uint32_t role;
    uint32_t reserved;
};

/* The page: 4096 bytes shared by the agent and one runtime process.  A field has
 * one writer.  The agent makes a new page for every connection. */
struct valve_page {
    uint32_t magic;
    uint16_t version;
    uint16_t reserved0;
    uint64_t heartbeat_ns; /* agent: its last sign of life */
    uint32_t gate;         /* agent: 0 unknown, 1 open, 2 paused */
    uint32_t reserved1;
    uint64_t memory_limit_bytes; /* agent: GPU memory that this process may have, its arena included; 0: any */
    uint8_t agent_reserved[32];

    uint32_t busy;           /* runtime, @64: 1 while a request is in this process */
    uint32_t busy_seq;       /* runtime: +1 at every change of busy */
    uint64_t busy_since_ns;  /* runtime: when busy became 1 */
    uint64_t decode_gap_ns;  /* runtime: longest recent gap between decode iterations */
    uint64_t requests;       /* runtime: requests seen */
    uint64_t tokens;         /* runtime: tokens generated */
    uint64_t recomputed;     /* runtime: requests recomputed after a reclaim */
    uint64_t lost_blocks;    /* runtime: KV blocks lost to reclaims */
    uint64_t recomputed_tokens; /* runtime */
    uint64_t direct_bytes;   /* runtime: GPU memory that it allocated beside its arena */
    uint8_t runtime_reserved[3960];
};

/* The ownership ledger: which request owns part of which slab, so that the agent
 * can choose victims while the runtime is stopped.  Double buffered: the runtime
 * fills copy (1 - active) and then stores `active`; a runtime stopped in the
 * middle of an update leaves the last whole copy in force.
 *
 * After the header come two copies, each of
 *   uint32_t tokens[VALVE_REQUESTS_MAX]   tokens to recompute if request r is lost
 *   uint64_t pinned[VALVE_BITMAP_WORDS]   slabs that must never be reclaimed
 *   uint64_t owners[slabs][VALVE_REQUESTS_MAX / 64]   requests that own part of slab s
 */
struct valve_ledger {
    uint32_t magic;
    uint16_t version;
    uint16_t reserved;
    uint32_t slabs;
    uint32_t active;    /* 0 or 1 */
    uint64_t updates;   /* +1 at every store of `active` */
    uint64_t base;      /* GPU: where the arena lies in the process; a later agent must know */
    uint8_t unused[32]; /* header is 64 bytes */
};
#define VALVE_LEDGER_COPY_BYTES(slabs) \
    (4ull * VALVE_REQUESTS_MAX + 8ull * VALVE_BITMAP_WORDS + (slabs) * (VALVE_REQUESTS_MAX / 8ull))
#define VALVE_LEDGER_BYTES(slabs) (64ull + 2ull * VALVE_LEDGER_COPY_BYTES(slabs))

/* What an offline process does with a GPU.  Its RM objects live on the open file that made
 * their client, and only that file controls them: so the files travel to the agent, and the
 * handles are in the table, 32768 bytes shared by the runtime (which made it, sealed against
 * shrinking) and the agent.  A field has one writer; the agent's are kept by the runtime
 * while there is no agent. */
enum valve_gpu_file_kind { VALVE_GPU_CTL = 1, VALVE_GPU_UVM = 2 };
enum valve_route {
    VALVE_ROUTE_NONE = 0,
    VALVE_ROUTE_AGENT = 1,       /* the agent controls the channels through the passed file */
    VALVE_ROUTE_IN_PROCESS = 2,  /* the runtime's control loop does, at the agent's command */
    VALVE_ROUTE_PATCHED = 3,     /* the agent does, through a file of its own: patched driver */
    VALVE_ROUTE_LAUNCH_GATE = 4, /* launches are held in the process */
};

#define VALVE_GPU_FILES_MAX 32u
#define VALVE_GPU_CHANNELS_MAX 1020u

struct valve_gpu_open {
    struct valve_header header;
    uint64_t table_bytes;
};

/* GPU_FILE and GPU_FILE_GONE share one body. */
struct valve_gpu_file {
    struct valve_header header;
    uint32_t number; /* below VALVE_GPU_FILES_MAX; free again after GPU_FILE_GONE */
    uint32_t kind;   /* enum valve_gpu_file_kind */
};

struct valve_gpu_channel {
    uint32_t state; /* 0: free; 1: the other fields hold.  Written last, and first to 0 */
    uint32_t file;  /* number of the control file of its client */
    uint32_t client; /* RM handles, from here */
    uint32_t subdevice;
    uint32_t group; /* 0: in none */
    uint32_t channel;
    uint32_t engine; /* engineType of its group, or its own */
    uint32_t hclass;
};

struct valve_gpu_table {
    uint32_t magic;
    uint16_t version;
    uint16_t reserved0;
    uint32_t hold;    /* agent: VALVE_GPU_HOLD_*; a shared futex */
    uint32_t taken;   /* agent: bit n: it controls what is on file n; a shared futex */
    uint64_t command; /* agent: sequence * 4 + enum valve_gpu_verb; then it rings the bell */
    uint32_t route;   /* agent: enum valve_route */
    uint8_t agent_reserved[36];

    uint64_t changes;  /* runtime, @64: +1 after every change of a channel */
    uint64_t answered; /* runtime: the last command carried out, as it stood in `command` */
    uint32_t answer;   /* runtime: RM status of it; 0 is success */
    uint32_t slots;    /* runtime: channels beyond this one were never used */
    uint32_t overflow; /* runtime: channels that found no room here, so nobody can pause them */
    uint32_t launch_hooks; /* runtime: launch entry points that went through its hooks */
    uint64_t launches_held; /* runtime: launches that had to wait */
    uint8_t runtime_reserved[24];

    struct valve_gpu_channel channels[VALVE_GPU_CHANNELS_MAX];
};
#define VALVE_GPU_HOLD_CHANNELS 1u /* make no channel and schedule none */
#define VALVE_GPU_HOLD_LAUNCHES 2u /* launch nothing */
enum valve_gpu_verb { VALVE_GPU_STOP_COMPUTE = 1, VALVE_GPU_STOP_ALL = 2, VALVE_GPU_RUN = 3 };

_Static_assert(sizeof(struct valve_gpu_table) == 32768, "gpu table");
_Static_assert(__builtin_offsetof(struct valve_gpu_table, changes) == 64, "runtime's part has its own cache line");
_Static_assert(sizeof(struct valve_header) == 16, "header");
_Static_assert(sizeof(struct valve_page) == 4096, "page");
_Static_assert(__builtin_offsetof(struct valve_page, busy) == 64, "runtime's half has its own cache line");
_Static_assert(sizeof(struct valve_ledger) == 64, "ledger header");

#endif
