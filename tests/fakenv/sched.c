/* SPDX-License-Identifier: Apache-2.0
 *
 * Who may run. Every change recomputes what a channel may do (`target`) and tells its engine
 * thread; waiting for an eviction happens with rm_lock held, as the driver holds the GPU lock
 * while the firmware answers.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <limits.h>
#include <poll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "fake.h"

enum { EVICT_TIMEOUT_MS = 1000, PREEMPT_MAX_US = 1000000 };

static bool all_siblings_disabled(const struct channel *channel)
{
    for (struct channel *c = machine.channels; c; c = c->next_all)
        if (c->tsg && c->tsg == channel->tsg && !c->disabled)
            return false;
    return true;
}

static enum fakenv_run target(const struct channel *ch)
{
    if (ch->stopped || machine.lost[ch->gpu])
        return RUN_EVICT;
    if (ch->disabled) {
        bool evicts = machine.evict == EVICT_DISABLE ||
                      (machine.evict == EVICT_SIBLINGS && all_siblings_disabled(ch));
        return ch->committed || (evicts && !ch->only_scheduling) ? RUN_EVICT : RUN_DRAIN;
    }
    return (ch->tsg ? ch->tsg->scheduled : ch->scheduled) ? RUN_ON : RUN_DRAIN;
}

static struct fakenv_slot *slot_of(const struct channel *ch)
{
    return ch->engine && !ch->engine->dead ? &ch->engine->shared->slot[ch->token] : NULL;
}

static void set_run(struct channel *ch, enum fakenv_run run)
{
    struct fakenv_slot *slot = slot_of(ch);
    if (!slot || atomic_exchange(&slot->run, run) == run)
        return;
    atomic_fetch_add(&slot->bell, 1);
    syscall(SYS_futex, &slot->bell, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

void channel_apply(struct channel *ch)
{
    set_run(ch, target(ch));
}

bool channel_wait_evicted(struct channel *ch)
{
    struct fakenv_slot *slot = slot_of(ch);
    if (!slot)
        return true;
    struct timespec tick = {.tv_nsec = 10000000};
    for (int waited_ms = 0; waited_ms < EVICT_TIMEOUT_MS; waited_ms += 10) {
        for (int wakes = 0; wakes < 64; wakes++) {
            if (atomic_load(&slot->state) != ST_RUNNING)
                return true;
            if (syscall(SYS_futex, &slot->state, FUTEX_WAIT, ST_RUNNING, &tick, NULL, 0))
                break;
        }
        struct pollfd gone = {.fd = ch->engine->command_fd};
        ch->engine->dead = poll(&gone, 1, 0) == 1;
        if (ch->engine->dead || atomic_load(&slot->state) != ST_RUNNING)
            return true;
    }
    machine.evict_timeouts++;
    return false;
}

static void apply_siblings(const struct channel *channel)
{
    for (struct channel *c = machine.channels; c; c = c->next_all)
        if (c == channel || (c->tsg && c->tsg == channel->tsg))
            channel_apply(c);
}

/* Waits for every channel that is to be off the GPU by now. */
static uint32_t wait_all(struct channel *const *list, unsigned count)
{
    uint32_t status = NV_OK;
    for (unsigned i = 0; i < count; i++)
        if (target(list[i]) == RUN_EVICT && !channel_wait_evicted(list[i]))
            status = NV_ERR_TIMEOUT;
    return status;
}

uint32_t sched_disable(const struct caller *caller, const struct ctrl_disable *p)
{
    struct channel *list[64];
    if (p->preempt_event)
        return NV_ERR_INSUFFICIENT_PERMISSIONS;
    if (p->count > 64)
        return NV_ERR_INVALID_ARGUMENT;
    for (unsigned i = 0; i < p->count; i++) {
        struct client *client = client_find(p->client[i]);
        /* What firmware does with a foreign client here is not known; nothing may rely on it. */
        if (client_validate(client, caller) != NV_OK)
            return NV_ERR_INVALID_CLIENT;
        struct object *o = object_find(client, p->channel[i]);
        if (!o || o->kind != OBJ_CHANNEL)
            return NV_ERR_OBJECT_NOT_FOUND;
        list[i] = o->channel;
    }
    for (unsigned i = 0; i < p->count; i++) {
        list[i]->disabled = p->disable;
        list[i]->only_scheduling = p->disable && p->only_scheduling;
        list[i]->committed = false;
    }
    for (unsigned i = 0; i < p->count; i++)
        apply_siblings(list[i]);
    uint32_t status = p->disable ? wait_all(list, p->count) : NV_OK;
    if (p->disable && p->rewind_gp_put)
        for (unsigned i = 0; i < p->count; i++) {
            struct fakenv_slot *slot = slot_of(list[i]);
            if (slot) /* what is under way stays; what was queued behind it is gone */
                slot->put = slot->get + (atomic_load(&slot->state) == ST_PARKED);
        }
    return status;
}

/* Takes a channel off the GPU once. A masked one stays off; another is put back by the caller. */
static bool kick(struct channel *ch, bool wait)
{
    if (ch->disabled) {
        ch->committed = true;
        channel_apply(ch);
    } else {
        set_run(ch, RUN_EVICT);
    }
    return !wait || channel_wait_evicted(ch);
}

uint32_t sched_preempt(struct tsg *tsg, const struct ctrl_preempt *p)
{
    uint32_t status = NV_OK;
    if (p->manual_timeout && p->timeout_us > PREEMPT_MAX_US)
        return NV_ERR_INVALID_ARGUMENT;
    for (struct channel *c = machine.channels; c; c = c->next_all)
        if (c->tsg == tsg && !kick(c, p->wait))
            status = NV_ERR_TIMEOUT;
    for (struct channel *c = machine.channels; c; c = c->next_all)
        if (c->tsg == tsg)
            channel_apply(c);
    return status;
}

uint32_t sched_restart_runlist(struct channel *channel, bool wait)
{
    uint32_t status = NV_OK;
    for (struct channel *c = machine.channels; c; c = c->next_all)
        if (c->gpu == channel->gpu && c->engine_type == channel->engine_type && !kick(c, wait))
            status = NV_ERR_TIMEOUT;
    for (struct channel *c = machine.channels; c; c = c->next_all)
        if (c->gpu == channel->gpu)
            channel_apply(c);
    return status;
}

void sched_set_tsg(struct tsg *tsg, bool scheduled)
{
    tsg->scheduled = scheduled; /* off: published to take effect only when the channel idles */
    for (struct channel *c = machine.channels; c; c = c->next_all)
        if (c->tsg == tsg)
            channel_apply(c);
}

void sched_apply_gpu(unsigned gpu)
{
    for (struct channel *c = machine.channels; c; c = c->next_all)
        if (c->gpu == gpu) {
            if (c->engine)
                atomic_store(&c->engine->shared->lost, machine.lost[gpu]);
            channel_apply(c);
        }
}

void sched_collect_faults(void)
{
    for (struct channel *c = machine.channels; c; c = c->next_all) {
        uint32_t xid = c->engine ? atomic_load(&c->engine->shared->xid) : 0;
        if (!xid || c->engine->fault_seen || c->engine->shared->slot[c->token].state != ST_DEAD)
            continue;
        c->engine->fault_seen = true;
        machine.last_xid[c->gpu] = xid;
        machine.xid_count[c->gpu]++;
    }
}
