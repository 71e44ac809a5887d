/* SPDX-License-Identifier: Apache-2.0
 *
 * The arena: one reservation of address space, every slab of it mapped either to its
 * own range of the arena file or to the quarantine page.  Never unmapped, so a touch
 * never faults.
 *
 * The control loop alone changes mappings.  A slab's word says what is so (ACTUAL)
 * and what the engine has been told (TOLD); events are the difference between the
 * two, so any history fits in one word and no queue can overflow.  Of the events
 * that wait, losses come first; those of one slab come in order.
 */
#include "arena_nvidia.h"
#include "frame.h"
#include "slab.h"
#include "state.h"
#include "sys.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define ALIGNMENT (2ull << 20)
#define READ_WRITE (PROT_READ | PROT_WRITE)

/* Mappings of the quarantine page that we allow ourselves: half of vm.max_map_count's default.
 * A larger arena is quarantined to private memory, which costs memory where it is touched;
 * agents avoid that by a larger quarantine page. */
#define MAPPINGS_MAX 32768

static int files[VALVE_FDS_MAX]; /* arena, quarantine, ledger: the control loop's descriptors */
static int without_page;

/* Device memory of a GPU: what lies at a slab was changed by the agent before it told us, or will
 * be before it believes us; here only the words change. */
static int is_elsewhere(void) { return valve.device == VALVE_DEVICE_NVIDIA; }

static int map_slabs(uint32_t first, uint32_t past)
{
    if (is_elsewhere())
        return 0;
    char *at = valve.base + first * valve.slab_bytes;
    size_t bytes = (past - first) * valve.slab_bytes;
    long got = sys_mmap(at, bytes, READ_WRITE, MAP_SHARED | MAP_FIXED, files[0], first * valve.slab_bytes);
    if (sys_failed(got))
        return (int)got;
    sys_madvise(at, bytes, MADV_DONTFORK);
    return 0;
}

static int quarantine_slabs(uint32_t first, uint32_t past)
{
    const int private = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (is_elsewhere())
        return 0;
    char *at = valve.base + first * valve.slab_bytes;
    size_t bytes = (past - first) * valve.slab_bytes;
    long got = 0;
    if (without_page)
        got = sys_mmap(at, bytes, READ_WRITE, private | MAP_FIXED, -1, 0);
    for (size_t done = 0; done < bytes && !without_page && !sys_failed(got); done += valve.quarantine_bytes)
        got = sys_mmap(at + done, valve.quarantine_bytes, READ_WRITE, MAP_SHARED | MAP_FIXED, files[1], 0);
    if (sys_failed(got)) {
        /* The process has as many mappings as it may (vm.max_map_count): some must go before
         * there can be one.  Nobody touches the slabs meanwhile: they were returned, or the
         * process is stopped; should its threads run and map something here, we fail. */
        sys_munmap(at, bytes);
        got = sys_mmap(at, bytes, READ_WRITE, private | MAP_FIXED_NOREPLACE, -1, 0);
    }
    if (sys_failed(got))
        return (int)got;
    sys_madvise(at, bytes, MADV_DONTFORK);
    return 0;
}

/* The slabs must not stay with an offline process, and they cannot be taken: end it. */
static void cannot_take(uint32_t slab)
{
    char number[24];
    int is_offline = valve.claimed == VALVE_ROLE_OFFLINE;
    VALVE_SAY("slab ", valve_decimal(slab, number), " cannot be taken from this process: no memory for mappings",
              is_offline ? "; it is killed" : "");
    if (is_offline)
        SYS2(SYS_kill, valve.main_pid, SIGKILL);
}

static void *reserve(uint64_t bytes)
{
    long at = sys_mmap(NULL, bytes + ALIGNMENT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (sys_failed(at))
        return NULL;
    uint64_t start = (uint64_t)at, aligned = (start + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
    if (aligned > start)
        sys_munmap((void *)start, aligned - start);
    if (start + ALIGNMENT > aligned)
        sys_munmap((void *)(aligned + bytes), start + ALIGNMENT - aligned);
    return (void *)aligned;
}

static int file_holds(int fd, uint64_t bytes)
{
    struct stat status;
    return SYS2(SYS_fstat, fd, &status) == 0 && (uint64_t)status.st_size >= bytes;
}

int valve_arena_map(const struct valve_arena *frame, const int fds[VALVE_FDS_MAX])
{
    uint64_t bytes = frame->slabs * frame->slab_bytes;
    int is_file = !is_elsewhere();
    if (is_file && (!file_holds(fds[0], bytes) || !file_holds(fds[1], frame->quarantine_bytes)))
        return -EINVAL;
    if (!file_holds(fds[2], frame->ledger_bytes) || (!is_file && valve_nvidia_base() == 0))
        return -EINVAL;
    long ledger = sys_mmap(NULL, frame->ledger_bytes, READ_WRITE, MAP_SHARED, fds[2], 0);
    if (sys_failed(ledger))
        return (int)ledger;
    valve.base = is_file ? reserve(bytes) : (char *)valve_nvidia_base();
    if (valve.base == NULL) {
        sys_munmap((void *)ledger, frame->ledger_bytes);
        return -ENOMEM;
    }
    sys_madvise((void *)ledger, frame->ledger_bytes, MADV_DONTFORK);
    valve.ledger = (struct valve_ledger *)ledger;
    valve.ledger->base = (uint64_t)valve.base;
    valve.ledger_bytes = frame->ledger_bytes;
    valve.slabs = (uint32_t)frame->slabs;
    valve.slab_bytes = frame->slab_bytes;
    valve.quarantine_bytes = frame->quarantine_bytes;
    without_page = bytes / frame->quarantine_bytes > MAPPINGS_MAX;
    for (int i = 0; i < VALVE_FDS_MAX; i++)
        files[i] = fds[i];
    return quarantine_slabs(0, valve.slabs);
}

static void granted(uint32_t slab, uint32_t also)
{
    uint32_t word = atomic_load(&valve.slab[slab]), next;
    do {
        next = (word & ~(uint32_t)SLAB_RETURNING) | SLAB_ACTUAL | also;
        if ((word & SLAB_TOLD) && !(word & SLAB_ACTUAL))
            next |= SLAB_RELOST;
    } while (!atomic_compare_exchange_weak(&valve.slab[slab], &word, next));
}

static void lost(uint32_t slab)
{
    uint32_t word = atomic_load(&valve.slab[slab]);
    while (!atomic_compare_exchange_weak(&valve.slab[slab], &word, word & SLAB_TOLD))
        ;
    if ((word & SLAB_TOLD) && !slab_loss_waits(word))
        atomic_fetch_add(&valve.losses_waiting, 1);
}

void valve_arena_grant(const struct valve_bitmap *set)
{
    uint32_t past, first = valve_bitmap_run(set, 0, valve.slabs, &past);
    for (; first < valve.slabs; first = valve_bitmap_run(set, past, valve.slabs, &past)) {
        if (map_slabs(first, past) != 0) {
            /* The engine is not told; the slabs go back as if it had returned them. */
            if (quarantine_slabs(first, past) != 0)
                cannot_take(first);
            for (uint32_t i = first; i < past; i++)
                granted(i, SLAB_RETURNING);
            atomic_store(&valve.returns_waiting, 1);
            continue;
        }
        for (uint32_t i = first; i < past; i++)
            granted(i, 0);
    }
    atomic_fetch_add(&valve.changes, 1);
}

void valve_arena_reclaim(const struct valve_bitmap *set)
{
    uint32_t past, first = valve_bitmap_run(set, 0, valve.slabs, &past);
    for (; first < valve.slabs; first = valve_bitmap_run(set, past, valve.slabs, &past)) {
        if (quarantine_slabs(first, past) != 0)
            cannot_take(first);
        for (uint32_t i = first; i < past; i++)
            lost(i);
    }
    atomic_fetch_add(&valve.changes, 1);
}

int valve_arena_take_returns(struct valve_bitmap *set)
{
    *set = (struct valve_bitmap){{0}};
    if (atomic_load(&valve.arena) != ARENA_READY || !atomic_exchange(&valve.returns_waiting, 0))
        return 0;
    int count = 0;
    for (uint32_t i = 0; i < valve.slabs; i++) {
        if (!(atomic_load(&valve.slab[i]) & SLAB_RETURNING))
            continue;
        if (quarantine_slabs(i, i + 1) != 0)
            cannot_take(i);
        atomic_fetch_and(&valve.slab[i], ~(uint32_t)(SLAB_RETURNING | SLAB_ACTUAL));
        valve_bitmap_add(set, i);
        count++;
    }
    return count;
}

void valve_arena_held(struct valve_bitmap *set)
{
    *set = (struct valve_bitmap){{0}};
    for (uint32_t i = 0; i < valve.slabs; i++)
        if (atomic_load(&valve.slab[i]) & SLAB_ACTUAL)
            valve_bitmap_add(set, i);
}

const int *valve_arena_fds(void) { return files; }

void valve_arena_forget(void)
{
    if (atomic_load(&valve.arena) == ARENA_READY) {
        for (int i = 0; i < VALVE_FDS_MAX && valve_shares_descriptors(); i++)
            sys_close(files[i]);
        if (!is_elsewhere())
            sys_munmap(valve.base, valve.slabs * valve.slab_bytes);
        sys_munmap(valve.ledger, valve.ledger_bytes);
    }
    for (uint32_t i = 0; i < VALVE_SLABS_MAX; i++)
        atomic_store(&valve.slab[i], 0);
    valve.base = NULL;
    valve.ledger = NULL;
    valve.slabs = 0;
    atomic_store(&valve.arena, ARENA_NONE);
    atomic_store(&valve.arena_bytes_wanted, 0);
    atomic_store(&valve.want_turn, 0);
    atomic_store(&valve.returns_waiting, 0);
    atomic_store(&valve.changes, 0);
    atomic_store(&valve.drained, 0);
    atomic_store(&valve.losses_waiting, 0);
}
