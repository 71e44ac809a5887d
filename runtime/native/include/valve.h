/* SPDX-License-Identifier: Apache-2.0
 *
 * libvalve's API for engine plugins (valve_runtime/_lib.py binds it by ctypes).
 * Every function may be called from any thread, never blocks on the agent unless
 * its comment says so, and does nothing useful but no harm when the process is
 * not a tenant.
 */
#ifndef VALVE_H
#define VALVE_H

#include <stdint.h>
#include <sys/types.h>

#define VALVE_API __attribute__((visibility("default")))

/* Version of the library, e.g. "0.1.0". */
VALVE_API const char *valve_version(void);

/* enum valve_role of this process as the agent confirmed it; before the agent
 * answered: as the launcher said (VALVE_WORKLOAD). */
VALVE_API int valve_role(void);

/* 1 while a connection to the agent stands. */
VALVE_API int valve_connected(void);

/* enum valve_device that the agent serves, as it said when this process was let in; 0 before. */
VALVE_API int valve_device(void);

/* Connect now (an online process otherwise connects when it first uses this API) and
 * wait up to timeout_ms for the agent.  1 if connected. */
VALVE_API int valve_attach(int timeout_ms);

/* The last sentence the agent refused us with, or "". */
VALVE_API const char *valve_last_error(void);

/* Busy / idle of this process, idempotent.  `decode_gap_ns` is the longest recent
 * gap between two decode iterations (0: unknown). */
VALVE_API void valve_busy(void);
VALVE_API void valve_idle(uint64_t decode_gap_ns);

/* Add to a counter of the shared page. */
enum valve_counter {
    VALVE_COUNT_REQUESTS = 0,
    VALVE_COUNT_TOKENS = 1,
    VALVE_COUNT_RECOMPUTED = 2,
    VALVE_COUNT_LOST_BLOCKS = 3,
    VALVE_COUNT_RECOMPUTED_TOKENS = 4,
};
VALVE_API void valve_count(int counter, uint64_t n);

/* Open this process's arena: reserves `bytes` (rounded up to slabs; 0: as much as the
 * tenant may ever hold) of address space, every slab of it on the quarantine page.  Waits up to timeout_ms for the
 * agent.  Returns the base (2 MiB aligned) or NULL; valve_last_error() says why.
 * One arena per process. */
VALVE_API void *valve_arena_open(uint64_t bytes, int timeout_ms, uint64_t *slab_bytes, uint32_t *slabs);

/* Tell the agent how many slabs this process would use in all; `urgent` when online
 * requests wait for them.  Answers come as events. */
VALVE_API int valve_want(uint32_t total_slabs, int urgent);

/* Give one slab back: it is remapped to quarantine, then the agent is told.  -1 if the
 * slab is not held (if it was lost meanwhile, valve_poll says so). */
VALVE_API int valve_return(uint32_t slab);

/* Next thing that happened to the arena.  Returns 1 and fills *event, or 0 if there
 * is none.  Losses come before grants; the events of one slab come in order (a slab
 * granted and lost before anyone asked gives none). */
enum valve_event_kind { VALVE_EVENT_GRANTED = 1, VALVE_EVENT_LOST = 2 };
struct valve_event {
    uint32_t kind;
    uint32_t slab;
};
VALVE_API int valve_poll(struct valve_event *event);

/* Pieces of the arena, each starting at a slab, the first at the arena's start; nothing is mapped
 * or written.  Which part of the arena is whose is decided here alone: engine plugins ask, and so
 * does torch's CUDAPluggableAllocator, whose signatures these are.  NULL: no room, or no arena. */
VALVE_API void *valve_torch_alloc(ssize_t bytes, int device, void *stream);
VALVE_API void valve_torch_free(void *at, ssize_t bytes, int device, void *stream);

/* Ownership ledger, one writer: begin; request/own/pin for everything; commit. */
VALVE_API int valve_ledger_begin(void);
VALVE_API void valve_ledger_request(uint32_t slot, uint32_t tokens);
VALVE_API void valve_ledger_own(uint32_t slab, uint32_t slot);
VALVE_API void valve_ledger_pin(uint32_t slab);
VALVE_API void valve_ledger_commit(void);

#endif
