/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernels. They run in the engine: no thread-local storage, no locks, no allocation. All their
 * parameters are 64 bits wide. Each calls cta() after a few microseconds of work.
 */
#include <string.h>
#include <time.h>

#include "cuda_fake.h"

enum { CTA_BYTES = 64 * 1024, CTA_NS = 20000 };

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t); /* the vDSO: no system call, no errno */
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void busy_cta(struct worker *w)
{
    for (uint64_t end = now_ns() + CTA_NS; now_ns() < end;)
        ;
    cta(w);
}

static void *pointer(uint64_t address)
{
    return (void *)(uintptr_t)address;
}

static void nop(struct worker *w, const struct fakenv_entry *e) {}

static void copy(struct worker *w, const struct fakenv_entry *e) /* dst, src, bytes */
{
    for (uint64_t at = 0; at < e->arg[2]; at += CTA_BYTES) {
        uint64_t n = e->arg[2] - at < CTA_BYTES ? e->arg[2] - at : CTA_BYTES;
        memcpy(pointer(e->arg[0] + at), pointer(e->arg[1] + at), n);
        cta(w);
    }
}

static void fill8(struct worker *w, const struct fakenv_entry *e) /* dst, value, count */
{
    for (uint64_t at = 0; at < e->arg[2]; at += CTA_BYTES) {
        uint64_t n = e->arg[2] - at < CTA_BYTES ? e->arg[2] - at : CTA_BYTES;
        memset(pointer(e->arg[0] + at), (int)e->arg[1], n);
        cta(w);
    }
}

static void fill32(struct worker *w, const struct fakenv_entry *e) /* dst, value, count */
{
    volatile uint32_t *p = pointer(e->arg[0]);
    for (uint64_t i = 0; i < e->arg[2]; i++) {
        p[i] = (uint32_t)e->arg[1];
        if (i % (CTA_BYTES / 4) == 0)
            cta(w);
    }
}

static void store32(struct worker *w, const struct fakenv_entry *e) /* address, value */
{
    *(volatile uint32_t *)pointer(e->arg[0]) = (uint32_t)e->arg[1];
}

static void wait32(struct worker *w, const struct fakenv_entry *e) /* address, value, flags */
{
    volatile uint32_t *p = pointer(e->arg[0]);
    while (e->arg[2] == 1 ? *p != (uint32_t)e->arg[1] : (int32_t)(*p - (uint32_t)e->arg[1]) < 0)
        busy_cta(w);
}

static void stamp(struct worker *w, const struct fakenv_entry *e) /* address */
{
    *(volatile uint64_t *)pointer(e->arg[0]) = now_ns();
}

static void spin_us(struct worker *w, const struct fakenv_entry *e) /* microseconds of GPU time */
{
    for (uint64_t n = e->arg[0] * 1000 / CTA_NS; n; n--)
        busy_cta(w);
}

static void timer_writer(struct worker *w, const struct fakenv_entry *e) /* uint64 out[2], microseconds */
{
    volatile uint64_t *out = pointer(e->arg[0]);
    for (uint64_t n = e->arg[1] * 1000 / CTA_NS; n; n--) {
        for (uint64_t end = now_ns() + CTA_NS; now_ns() < end;)
            out[0] = now_ns();
        out[1]++;
        cta(w);
    }
}

static void touch_pages(struct worker *w, const struct fakenv_entry *e) /* base, bytes, stride, value, rounds */
{
    for (uint64_t round = 0; round < e->arg[4]; round++)
        for (uint64_t at = 0; at < e->arg[1]; at += e->arg[2]) {
            *(volatile uint32_t *)pointer(e->arg[0] + at) = (uint32_t)e->arg[3];
            if (at % CTA_BYTES == 0)
                cta(w);
        }
}

static void checksum(struct worker *w, const struct fakenv_entry *e) /* src, bytes, rounds, uint64 *out */
{
    uint64_t sum = 1469598103934665603u;
    const uint64_t *p = pointer(e->arg[0]);
    for (uint64_t round = 0; round < e->arg[2]; round++)
        for (uint64_t i = 0; i < e->arg[1] / 8; i++) {
            sum = (sum ^ p[i]) * 1099511628211u;
            if (i % (CTA_BYTES / 8) == 0)
                cta(w);
        }
    *(volatile uint64_t *)pointer(e->arg[3]) = sum;
}

const struct kernel kernels[] = {
    [OP_NOP] = {"nop", 0, nop},
    [OP_COPY] = {"copy", 3, copy},
    [OP_FILL8] = {"fill8", 3, fill8},
    [OP_FILL32] = {"fill32", 3, fill32},
    [OP_STORE32] = {"store32", 2, store32},
    [OP_WAIT32] = {"wait32", 3, wait32},
    [OP_STAMP] = {"stamp", 1, stamp},
    [OP_KERNELS] = {"spin_us", 1, spin_us},
    {"timer_writer", 2, timer_writer},
    {"touch_pages", 5, touch_pages},
    {"checksum", 4, checksum},
};
const unsigned kernel_count = sizeof kernels / sizeof kernels[0];
