/* SPDX-License-Identifier: Apache-2.0
 *
 * Everything libvalve knows in one process, and who may write what.
 *
 * Two parties: the *control loop* (one thread, or the address-space helper) and the
 * process's own threads.  The process may be stopped at any instruction while the
 * control loop goes on, so nothing here is guarded by a lock: fields are atomic,
 * or belong to one party alone.
 */
#ifndef VALVE_STATE_H
#define VALVE_STATE_H

#include "valve.h"
#include "valve_protocol.h"

#include <stdalign.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/un.h>

#ifndef VALVE_LIBRARY_VERSION
#define VALVE_LIBRARY_VERSION "0.0.0"
#endif

#define VALVE_HIGH_FD 700 /* our descriptors live above this, out of the way of select() */
#define VALVE_FDS_MAX 3
#define VALVE_NS_PER_MS 1000000ull

enum valve_link { LINK_DOWN = 0, LINK_HELLO = 1, LINK_UP = 2 };
enum valve_arena_state { ARENA_NONE = 0, ARENA_WANTED = 1, ARENA_ASKED = 2, ARENA_READY = 3, ARENA_REFUSED = 4 };
enum valve_gpu_state { GPU_UNKNOWN = 0, GPU_UNCONTROLLED = 1, GPU_CONTROLLED = 2 };
enum valve_started { START_NO = 0, START_RUNNING = 1, START_FAILED = 2 };

struct valve_state {
    /* Written by the constructor (and after fork) before anything else runs. */
    int enabled; /* the process is a tenant: VALVE_SOCKET was set */
    int claimed; /* enum valve_role */
    int main_pid;
    int barrier;   /* registered for MEMBARRIER_CMD_GLOBAL_EXPEDITED */
    int drop_lost; /* VALVE_FAULT=drop-lost: tests that prove that the checks have power */
    struct sockaddr_un address;
    char comm[16];

    /* Control loop: written by it, read by all. */
    _Atomic int started; /* enum valve_started */
    _Atomic int control_tgid, control_tid;
    _Atomic uint32_t link; /* enum valve_link; a futex */
    _Atomic int role;
    _Atomic int refused; /* offline, in its constructor: the agent will not have this process */
    _Atomic int doorbell; /* descriptor in the process's own table, or -1 */
    uint32_t device;      /* enum valve_device; this and the next two: before the link is UP, from WELCOME */
    uint64_t slab_bytes_told;
    uint32_t slabs_limit;
    _Atomic uint32_t error_turn;
    char errors[4][VALVE_TEXT_BYTES + 64];

    /* GPU (gpu.h).  The two ends of a socket pair: the process's threads write, the control loop reads. */
    _Atomic int gpu_pipe;
    int gpu_control_end;      /* in the control loop's table */
    uint64_t gpu_pipe_inode;
    _Atomic uint32_t gpu_state; /* enum valve_gpu_state, by the control loop */

    /* Busy state: (sequence << 1) | busy.  Written by the process's threads. */
    _Atomic uint64_t busy_word;
    _Atomic uint64_t busy_since_ns, decode_gap_ns;
    _Atomic uint64_t counts[5];

    /* Requests of the process's threads to the control loop. */
    _Atomic uint32_t want_total, want_urgent, want_turn;
    _Atomic int returns_waiting;
    _Atomic uint64_t arena_bytes_wanted;

    /* The arena.  `arena` is a futex; geometry is written before it turns READY. */
    _Atomic uint32_t arena;
    char *base;
    uint32_t slabs;
    uint64_t slab_bytes, quarantine_bytes, ledger_bytes;
    struct valve_ledger *ledger;
    _Atomic uint32_t slab[VALVE_SLABS_MAX]; /* SLAB_* bits */
    _Atomic uint64_t changes;               /* +1 after every change of a slab by the control loop */
    _Atomic uint64_t drained;               /* value of `changes` at which valve_poll found nothing */
    _Atomic int64_t losses_waiting;
};

extern struct valve_state valve;

/* Are the control loop's descriptors in the process's own table?  (The helper has a table
 * of its own: its numbers mean nothing to the process.) */
static inline int valve_shares_descriptors(void)
{
#ifdef VALVE_CONTROL_THREAD
    return 1;
#else
    return valve.claimed == VALVE_ROLE_ONLINE;
#endif
}

/* The page: private memory until an agent's page is mapped over it, so that no thread
 * ever sees an invalid address. */
extern struct valve_page valve_page_memory;

/* attach.c */
int valve_start(void); /* 1 if the control loop runs; starts it in an online process */
void valve_wake(void); /* make the control loop look at the requests */

/* say.c: one line on stderr, "valve: ..."; the list of strings ends with NULL. */
void valve_say(const char *const *parts);
#define VALVE_SAY(...) valve_say((const char *const[]){__VA_ARGS__, NULL})
void valve_set_error(const char *const *parts);
#define VALVE_SET_ERROR(...) valve_set_error((const char *const[]){__VA_ARGS__, NULL})
const char *valve_decimal(uint64_t value, char buffer[24]);
void valve_copy_text(char *to, size_t size, const char *from);

/* python_path.c */
void valve_python_path(const char *folder);

/* page.c */
int valve_page_map(int fd); /* consumes nothing; 0 or -errno */
void valve_page_reset(void);
void valve_page_republish(void);

/* arena.c: called by the control loop only */
int valve_arena_map(const struct valve_arena *frame, const int fds[VALVE_FDS_MAX]);
void valve_arena_grant(const struct valve_bitmap *set);
void valve_arena_reclaim(const struct valve_bitmap *set);
int valve_arena_take_returns(struct valve_bitmap *set); /* slabs remapped, 0 if none */
void valve_arena_held(struct valve_bitmap *set);
const int *valve_arena_fds(void);
void valve_arena_forget(void); /* in a forked child */

/* control.c */
void valve_control_reset(void); /* in a forked child: forget the parent's connection */
void valve_control_run(int in_helper); /* never returns */

/* spawn.c: start the control loop; -errno, or 0 (thread), or the helper's pid */
int valve_spawn_thread(void);
int valve_spawn_helper(void);
/* spawn.c: a detached thread that takes no signals; -errno or 0 */
int valve_start_thread(void *(*run)(void *));

#endif
