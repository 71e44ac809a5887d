/* SPDX-License-Identifier: Apache-2.0
 *
 * The page: busy/idle and counters, the hot path of an online engine.
 *
 * The truth is kept in `valve` and *copied* to the page, so that an agent that
 * restarts finds it in the new page.  Several threads may copy at once: each
 * repeats until the truth it copied is still the truth, so the last copy is right.
 */
#include "memory_limit.h"
#include "state.h"
#include "sys.h"

#include <sys/mman.h>

alignas(4096) struct valve_page valve_page_memory;
#define PAGE (&valve_page_memory)
#define STORE(field, value) __atomic_store_n(&PAGE->field, value, __ATOMIC_SEQ_CST)

static void publish_busy(void)
{
    uint64_t word;
    do {
        word = atomic_load(&valve.busy_word);
        STORE(decode_gap_ns, atomic_load(&valve.decode_gap_ns));
        STORE(busy_since_ns, atomic_load(&valve.busy_since_ns));
        STORE(busy_seq, (uint32_t)(word >> 1));
        STORE(busy, (uint32_t)(word & 1));
    } while (atomic_load(&valve.busy_word) != word);
}

static void ring(void)
{
    static const uint64_t one = 1;
    int fd = atomic_load(&valve.doorbell);
    if (fd >= 0) /* non-blocking; a full counter is as good as a ring */
        (void)SYS3(SYS_write, fd, &one, sizeof one);
}

static int set_busy(uint64_t busy)
{
    uint64_t word = atomic_load(&valve.busy_word);
    do {
        if ((word & 1) == busy)
            return 0;
    } while (!atomic_compare_exchange_weak(&valve.busy_word, &word, (((word >> 1) + 1) << 1) | busy));
    return 1;
}

void valve_busy(void)
{
    if (!valve.enabled || atomic_load(&valve.busy_word) & 1)
        return;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    atomic_store(&valve.busy_since_ns, (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec);
    if (set_busy(1)) {
        publish_busy();
        ring();
    }
    valve_start(); /* after the ring: the first call of an online process starts the control thread */
}

void valve_idle(uint64_t decode_gap_ns)
{
    if (!valve.enabled)
        return;
    atomic_store(&valve.decode_gap_ns, decode_gap_ns);
    if (set_busy(0)) {
        publish_busy();
        ring();
    }
}

static uint64_t *counter_in_page(int counter)
{
    switch (counter) {
    case VALVE_COUNT_REQUESTS: return &PAGE->requests;
    case VALVE_COUNT_TOKENS: return &PAGE->tokens;
    case VALVE_COUNT_RECOMPUTED: return &PAGE->recomputed;
    case VALVE_COUNT_LOST_BLOCKS: return &PAGE->lost_blocks;
    case VALVE_COUNT_RECOMPUTED_TOKENS: return &PAGE->recomputed_tokens;
    default: return NULL;
    }
}

static void publish_count(int counter)
{
    uint64_t value;
    do {
        value = atomic_load(&valve.counts[counter]);
        __atomic_store_n(counter_in_page(counter), value, __ATOMIC_SEQ_CST);
    } while (atomic_load(&valve.counts[counter]) != value);
}

void valve_count(int counter, uint64_t n)
{
    if (!valve.enabled || counter_in_page(counter) == NULL)
        return;
    atomic_fetch_add(&valve.counts[counter], n);
    publish_count(counter);
}

int valve_page_map(int fd)
{
    long at = sys_mmap(PAGE, sizeof *PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    return sys_failed(at) ? (int)at : 0;
}

void valve_page_republish(void)
{
    for (int i = 0; i < 5; i++)
        publish_count(i);
    __atomic_store_n(&PAGE->direct_bytes, memory_limit_used(), __ATOMIC_SEQ_CST);
    publish_busy();
    ring();
}

/* A forked child must not write into its parent's page. */
void valve_page_reset(void)
{
    long at = sys_mmap(PAGE, sizeof *PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (sys_failed(at))
        VALVE_SAY("cannot give a forked child its own page: out of memory");
}
