/* SPDX-License-Identifier: Apache-2.0
 *
 * The supervisor's model: what it remembers of open files, clients and objects.
 *
 * Threads: one per seccomp listener (notify.c), one for the control socket (knobs.c), one that
 * watches for last closes (files.c), and one short-lived per request that has to wait. All model
 * state is guarded by `rm_lock`, which stands for the driver's API and GPU locks: a slow call that
 * holds it delays every other call, as on a real driver. Functions below expect it held unless
 * they say otherwise.
 */
#ifndef FAKENV_FAKE_H
#define FAKENV_FAKE_H
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "abi.h"
#include "branch.h"
#include "gpu.h"

enum file_kind { FILE_CTL, FILE_GPU, FILE_UVM };

struct memory { /* physical memory of a GPU; freed when objects, exports and mappings are gone */
    unsigned refs, gpu;
    uint64_t bytes;
    int fd;
    pid_t pid; /* who pays */
};

struct range { /* of one UVM file: an external range, or a mapping inside one */
    struct range *next;
    uint64_t base, length, offset;
    struct memory *memory; /* NULL: sparse */
};

struct engine { /* the GPU as one CUDA process sees it */
    int command_fd, shared_fd;
    struct fakenv_shared *shared;
    uint64_t slots_used[FAKENV_SLOTS / 64]; /* bit per slot */
    unsigned refs;       /* UVM file, channels */
    bool dead;           /* its process has gone */
    bool fault_seen;
};

struct file { /* one open(); the driver's file private */
    struct file *next;
    uint64_t inode;
    dev_t device;
    int watch_fd; /* our end; hangs up at the last close of the other */
    enum file_kind kind;
    unsigned minor;
    pid_t pid;            /* opener */
    struct file *ctl;     /* FILE_GPU: REGISTER_FD */
    struct memory *exported;
    bool initialized;     /* FILE_UVM */
    struct engine *engine;
    struct range *external, *mapped;
};

struct tsg { unsigned refs, gpu, engine_type, id; uint64_t timeslice_us; bool scheduled; };

struct channel {
    struct channel *next_all;
    struct tsg *tsg;
    uint32_t client, handle, cilp;
    unsigned gpu, engine_type, token;
    struct engine *engine; /* NULL: no process plays the GPU (an RM-only client) */
    bool scheduled;        /* by A06F, for a channel without a TSG of its own */
    bool disabled, only_scheduling, committed, stopped;
};

enum object_kind { OBJ_OTHER, OBJ_DEVICE, OBJ_SUBDEVICE, OBJ_VASPACE, OBJ_TSG, OBJ_CHANNEL, OBJ_MEMORY };
struct object {
    struct object *next;
    uint32_t handle, parent, hclass, shared_with; /* shared_with: a client that may dup it */
    enum object_kind kind;
    unsigned gpu;
    union { struct tsg *tsg; struct channel *channel; struct memory *memory; };
};

struct client {
    struct client *next;
    uint32_t handle, next_handle;
    struct file *owner; /* the strict check compares with this, and with nothing else */
    pid_t pid;
    struct object *objects;
};

struct caller { pid_t tid; struct file *file; int listener; uint64_t id; };

enum validate { VALIDATE_STRICT, VALIDATE_PATCHED };      /* patched: CAP_SYS_ADMIN passes */
enum evict { EVICT_DISABLE, EVICT_COMMIT, EVICT_SIBLINGS }; /* which evidence on E1/E2 is true */

enum { RULES = 16 };
struct rule { uint32_t number, status, delay_us; bool alloc, deny; uint32_t left; };

struct machine {
    const struct branch *branch;
    char version[64];
    bool driver, need_nodes; /* need_nodes: a path is ours where the caller's /dev has that node */
    unsigned gpus;
    uint64_t gpu_bytes, used_bytes[FAKENV_MAX_GPUS];
    bool lost[FAKENV_MAX_GPUS];
    uint32_t last_xid[FAKENV_MAX_GPUS];
    uint64_t xid_count[FAKENV_MAX_GPUS];
    enum validate validate;
    enum evict evict;
    bool unmap_syncs;
    unsigned compute_channels; /* of each context */
    struct rule rules[RULES];
    struct file *files;
    struct client *clients;
    struct channel *channels;
    uint64_t calls, remaps_while_running, evict_timeouts;
    unsigned next_token, next_tsg;
};
extern struct machine machine;
extern pthread_mutex_t rm_lock;
extern pthread_mutex_t files_lock; /* the list machine.files; taken inside rm_lock, never the other way */

/* files.c */
void files_start_watch(void);
/* Opens a device for `tid`: the descriptor to hand over, or -errno. Takes rm_lock. */
int files_open(enum file_kind kind, unsigned minor, pid_t tid);
/* The file behind descriptor `fd` of `tid`, or NULL when it is not one of ours. */
struct file *files_find(pid_t tid, int fd);
/* What kind of file of ours that path of /proc leads to; false when to none. Needs no rm_lock. */
bool files_look_at(const char *path, enum file_kind *kind, unsigned *minor);
/* The same of a descriptor. */
bool files_look(pid_t tid, int fd, enum file_kind *kind, unsigned *minor);
uint32_t gpu_id(unsigned gpu);
void gpu_uuid(unsigned gpu, uint8_t uuid[16]);
void memory_put(struct memory *memory);
void engine_put(struct engine *engine);

/* remote.c; none needs rm_lock. All return false when the other process's memory is not there. */
bool remote_read(pid_t tid, uint64_t address, void *to, size_t bytes);
bool remote_write(pid_t tid, uint64_t address, const void *from, size_t bytes);
size_t remote_path(pid_t tid, uint64_t address, char *to, size_t bytes);
pid_t remote_tgid(pid_t tid);
bool remote_capable(pid_t tid, unsigned capability);
/* The process `pid` as `tid` would call it: in its PID namespace; 0 when it is not to be seen from there. */
pid_t remote_name(pid_t tid, pid_t pid);

/* nodes.c. Whether the caller's file system has that node, or need not have it. Needs no rm_lock. */
bool nodes_there(pid_t tid, const char *path);
/* The result of a stat, access or readlink call, -errno, or NODE_NOT_OURS. Needs no rm_lock. */
enum { NODE_NOT_OURS = INT32_MIN };
int64_t nodes_answer(pid_t tid, int nr, const uint64_t arg[6]);

/* rm.c: each fills in the status field of its parameters */
void rm_alloc(const struct caller *caller, struct nvos64 *p);
void rm_free(const struct caller *caller, struct nvos00 *p);
void rm_dup(const struct caller *caller, struct nvos55 *p);
void rm_share(const struct caller *caller, struct nvos57 *p);
struct client *client_find(uint32_t handle);
struct object *object_find(struct client *client, uint32_t handle);
/* NV_OK or INVALID_CLIENT: the driver's pOSInfo comparison. */
uint32_t client_validate(const struct client *client, const struct caller *caller);
struct object *object_add(struct client *client, uint32_t *handle, uint32_t parent, uint32_t hclass,
                          enum object_kind kind, uint32_t *status);
void client_free(struct client *client);

/* control.c */
void rm_control(const struct caller *caller, struct nvos54 *p);

/* sched.c */
void channel_apply(struct channel *channel);
bool channel_wait_evicted(struct channel *channel);
uint32_t sched_disable(const struct caller *caller, const struct ctrl_disable *p);
uint32_t sched_preempt(struct tsg *tsg, const struct ctrl_preempt *p);
uint32_t sched_restart_runlist(struct channel *channel, bool wait);
void sched_set_tsg(struct tsg *tsg, bool scheduled);
void sched_apply_gpu(unsigned gpu);
/* Turns faults that engines have met since the last call into Xid 31. */
void sched_collect_faults(void);

/* uvm.c: status word of the params is written back by it; returns 0 or -errno */
int uvm_ioctl(const struct caller *caller, uint32_t command, uint64_t argument);
void uvm_release(struct file *file);
/* Sends a command to the engine and waits for its answer. `fd` < 0: none. */
uint32_t engine_call(struct engine *engine, const struct engine_command *command, int fd);

/* notify.c: puts a copy of our `fd` into the caller; its number there, or -errno. */
int notify_give(const struct caller *caller, int fd, bool cloexec);
/* notify.c: starts a thread that serves this listener until its last process has gone. */
void notify_serve(int listener);
/* filter.c: installs the filter in the calling process; returns the listener. Exits on failure. */
int filter_install(void);
/* Why notification cannot work here, or NULL. */
const char *filter_unavailable(void);

/* knobs.c: executes one line of the control protocol; the answer is text. Takes rm_lock. */
void knobs_execute(const char *line, char *answer, size_t bytes);
/* NV_OK, or the status that a rule demands; sleeps first when a rule says so. */
uint32_t knobs_rule(bool alloc, uint32_t number);
/* Whether any rule delays calls. Takes no lock: a stale answer only costs a thread. */
bool knobs_slow(void);

#endif
