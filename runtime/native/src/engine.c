/* SPDX-License-Identifier: Apache-2.0
 *
 * What an engine asks about its arena: open, want, return, poll.  Runs in the
 * process's own threads; the control loop does the work.
 */
#include "arena_nvidia.h"
#include "slab.h"
#include "state.h"
#include "sys.h"

static void set_no_arena_in_time(void)
{
    VALVE_SET_ERROR("no arena in time: the agent at ", valve.address.sun_path,
                    " does not answer; is `valve agent` running?");
}

void *valve_arena_open(uint64_t bytes, int timeout_ms, uint64_t *slab_bytes, uint32_t *slabs)
{
    if (!valve_start()) {
        VALVE_SET_ERROR("this process is no tenant: start it with `valve run`");
        return NULL;
    }
    uint64_t deadline_ns = sys_now_ns() + (uint64_t)(timeout_ms > 0 ? timeout_ms : 0) * VALVE_NS_PER_MS;
    if (!valve_attach(timeout_ms)) {
        set_no_arena_in_time();
        return NULL;
    }
    if (valve.device == VALVE_DEVICE_NVIDIA && atomic_load(&valve.arena) != ARENA_READY &&
        valve_nvidia_open(bytes, (uint64_t)timeout_ms * VALVE_NS_PER_MS) != 0)
        return NULL;
    uint32_t state = atomic_load(&valve.arena);
    while (state == ARENA_NONE || state == ARENA_REFUSED) {
        atomic_store(&valve.arena_bytes_wanted, bytes);
        if (atomic_compare_exchange_strong(&valve.arena, &state, ARENA_WANTED)) {
            valve_wake();
            break; /* whatever it is now is the answer: asking twice would lose it */
        }
    }
    for (;;) {
        state = atomic_load(&valve.arena);
        if (state == ARENA_READY) {
            *slab_bytes = valve.slab_bytes;
            *slabs = valve.slabs;
            return valve.base;
        }
        if (state == ARENA_REFUSED || state == ARENA_NONE)
            return NULL;
        uint64_t now = sys_now_ns();
        if (now >= deadline_ns) {
            set_no_arena_in_time();
            return NULL;
        }
        sys_futex_wait(&valve.arena, state, deadline_ns - now);
    }
}

int valve_want(uint32_t total_slabs, int urgent)
{
    if (!valve_start())
        return -1;
    atomic_store(&valve.want_total, total_slabs);
    atomic_store(&valve.want_urgent, urgent != 0);
    atomic_fetch_add(&valve.want_turn, 1);
    valve_wake();
    return 0;
}

int valve_return(uint32_t slab)
{
    if (atomic_load(&valve.arena) != ARENA_READY || slab >= valve.slabs)
        return -1;
    uint32_t held = SLAB_ACTUAL | SLAB_TOLD;
    if (!atomic_compare_exchange_strong(&valve.slab[slab], &held, SLAB_ACTUAL | SLAB_RETURNING))
        return -1; /* not held; if it was lost, the event says so */
    atomic_store(&valve.returns_waiting, 1);
    valve_wake();
    return 0;
}

static int take(uint32_t slab, int losses)
{
    uint32_t word = atomic_load(&valve.slab[slab]), next;
    do {
        if (losses ? !slab_loss_waits(word) : !slab_grant_waits(word))
            return 0;
        next = losses ? word & ~(uint32_t)(SLAB_TOLD | SLAB_RELOST) : word | SLAB_TOLD;
    } while (!atomic_compare_exchange_weak(&valve.slab[slab], &word, next));
    if (losses)
        atomic_fetch_sub(&valve.losses_waiting, 1);
    return 1;
}

int valve_poll(struct valve_event *event)
{
    static _Atomic uint32_t cursor; /* where the next grant is likely */
    if (atomic_load(&valve.arena) != ARENA_READY)
        return 0;
    uint64_t changes = atomic_load(&valve.changes);
    if (changes == atomic_load(&valve.drained))
        return 0;
    for (uint32_t i = 0; i < valve.slabs && atomic_load(&valve.losses_waiting) != 0; i++)
        if (take(i, 1) && !valve.drop_lost) {
            *event = (struct valve_event){VALVE_EVENT_LOST, i};
            return 1;
        }
    uint32_t start = atomic_load(&cursor);
    for (uint32_t n = 0; n < valve.slabs; n++) {
        uint32_t i = (start + n) % valve.slabs;
        if (take(i, 0)) {
            atomic_store(&cursor, i + 1);
            *event = (struct valve_event){VALVE_EVENT_GRANTED, i};
            return 1;
        }
    }
    atomic_store(&valve.drained, changes);
    return 0;
}
