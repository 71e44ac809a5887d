/* SPDX-License-Identifier: Apache-2.0
 *
 * What both sides of `valve bench preempt` do alike around the thing measured, so
 * that nothing but the preemption differs: how long the victim runs before it is
 * stopped, how long it stays stopped, and the look at its counters meanwhile.
 */
#ifndef CYCLE_H
#define CYCLE_H
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct cycle {
    long hold_us, gap_us;
    volatile uint64_t *counters; /* of the victim, one cache line each */
    int spinners;
    unsigned seed;
    uint64_t before;
};

static inline void die(const char *what)
{
    perror(what);
    exit(2);
}

static inline void die_usage(const char *usage)
{
    fprintf(stderr, "usage: %s\n", usage);
    exit(2);
}

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* words: HOLD_US GAP_US COUNTERS_FILE SPINNERS */
static inline void cycle_init(struct cycle *c, char **words)
{
    c->hold_us = atol(words[0]);
    c->gap_us = atol(words[1]);
    c->spinners = atoi(words[3]);
    c->seed = 1;
    int fd = open(words[2], O_RDONLY);
    if (fd < 0)
        die(words[2]);
    c->counters = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    if (c->counters == MAP_FAILED)
        die("mmap");
}

static inline uint64_t cycle_sum(const struct cycle *c)
{
    uint64_t sum = 0;
    for (int i = 0; i < c->spinners; i++)
        sum += c->counters[8 * i];
    return sum;
}

/* The victim runs: between gap and 2 * gap, so that cycles do not march in step with the tick. */
static inline void cycle_gap(struct cycle *c)
{
    usleep((useconds_t)(c->gap_us + rand_r(&c->seed) % (c->gap_us + 1)));
}

/* Wait until *state is `stopped`, then once more as long while it is; then look at cycle_moved. */
static inline void cycle_hold(struct cycle *c, const _Atomic uint32_t *state, uint32_t stopped)
{
    do
        usleep((useconds_t)c->hold_us);
    while (*state != stopped);
    c->before = cycle_sum(c);
    usleep((useconds_t)c->hold_us);
}

/* 1 if a thread of the victim has executed since it was said to be stopped. */
static inline uint64_t cycle_moved(const struct cycle *c)
{
    return cycle_sum(c) != c->before;
}
#endif
