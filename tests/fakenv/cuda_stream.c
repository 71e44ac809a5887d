/* SPDX-License-Identifier: Apache-2.0
 *
 * Streams, events and submission. An operation carries semaphores: it waits for the one before it
 * in its stream (and perhaps for another stream), and releases its own number when done, so a
 * stream's operations may sit on different channels. A full ring blocks the submitter, as on a GPU.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "cuda_fake.h"

enum { CU_STREAM_LEGACY = 1, CU_STREAM_PER_THREAD = 2, TICK_NS = 20000000 };

static void nap(void *word, uint32_t value)
{
    struct timespec tick = {.tv_nsec = TICK_NS};
    syscall(SYS_futex, word, FUTEX_WAIT, value, &tick, NULL, 0);
}

CUresult context_error(void)
{
    if (!cuda.shared)
        return CUDA_SUCCESS;
    if (atomic_load(&cuda.shared->xid))
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    return atomic_load(&cuda.shared->lost) ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS;
}

void stream_init(struct stream *stream, struct context *ctx, unsigned channel)
{
    stream->ctx = ctx;
    stream->channel = channel;
    pthread_mutex_init(&stream->lock, NULL);
}

struct stream *cuda_stream(struct context *ctx, CUstream stream)
{
    return (uintptr_t)stream <= CU_STREAM_PER_THREAD ? &ctx->null_stream : stream;
}

static CUresult submit(struct ring *ring, const struct fakenv_entry *entry)
{
    struct fakenv_slot *slot = &cuda.shared->slot[ring->slot];
    CUresult r = CUDA_SUCCESS;
    pthread_mutex_lock(&ring->lock);
    for (uint32_t get; slot->put - (get = atomic_load(&slot->get)) >= FAKENV_RING && !(r = context_error());)
        nap(&slot->get, get);
    if (!r) {
        slot->ring[slot->put % FAKENV_RING] = *entry;
        atomic_fetch_add(&slot->put, 1);
        atomic_fetch_add(&slot->bell, 1);
        syscall(SYS_futex, &slot->bell, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
    pthread_mutex_unlock(&ring->lock);
    return r;
}

CUresult stream_issue(struct stream *stream, unsigned channel, const struct fakenv_entry *op,
                      const struct stream *after, uint64_t after_value)
{
    CUresult r = context_error();
    if (r)
        return r;
    struct fakenv_entry e = *op;
    pthread_mutex_lock(&stream->lock);
    e.wait_at[0] = e.done_at = (uintptr_t)&stream->done;
    e.wait_for[0] = stream->issued;
    e.done_value = stream->issued + 1;
    if (after) {
        e.wait_at[1] = (uintptr_t)&after->done;
        e.wait_for[1] = after_value;
    }
    r = submit(&stream->ctx->ring[channel], &e);
    if (!r)
        stream->issued++;
    pthread_mutex_unlock(&stream->lock);
    return r;
}

CUresult stream_wait(struct stream *stream, uint64_t value)
{
    CUresult r;
    for (uint64_t have; !(r = context_error()) && (have = atomic_load(&stream->done)) < value;)
        nap(&stream->done, (uint32_t)have);
    return r;
}

CUresult context_wait(struct context *ctx)
{
    CUresult r = stream_wait(&ctx->null_stream, ctx->null_stream.issued);
    for (struct stream *s = ctx->streams; s && !r; s = s->next)
        r = stream_wait(s, s->issued);
    return r;
}

/* ---- streams ---- */

API CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority)
{
    struct context *ctx;
    CUresult r = cuda_current(&ctx);
    if (r)
        return r;
    struct stream *s = calloc(1, sizeof *s);
    if (!s)
        return CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&cuda_lock);
    stream_init(s, ctx, ++ctx->next_channel % ctx->compute_channels);
    s->priority = priority;
    s->next = ctx->streams;
    ctx->streams = s;
    pthread_mutex_unlock(&cuda_lock);
    *stream = s;
    return CUDA_SUCCESS;
}

API CUresult cuStreamCreate(CUstream *stream, unsigned flags)
{
    return cuStreamCreateWithPriority(stream, flags, 0);
}

static CUresult find(CUstream stream, struct stream **s)
{
    struct context *ctx;
    CUresult r = cuda_current(&ctx);
    if (!r)
        *s = cuda_stream(ctx, stream);
    return r;
}

API CUresult cuStreamSynchronize(CUstream stream)
{
    struct stream *s;
    CUresult r = find(stream, &s);
    return r ? r : stream_wait(s, s->issued);
}

API CUresult cuStreamQuery(CUstream stream)
{
    struct stream *s;
    CUresult r = find(stream, &s);
    if (r || (r = context_error()))
        return r;
    return atomic_load(&s->done) >= s->issued ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

API CUresult cuStreamDestroy_v2(CUstream stream)
{
    struct stream *s;
    CUresult r = find(stream, &s);
    if (r)
        return r;
    if (s == &s->ctx->null_stream)
        return CUDA_ERROR_INVALID_HANDLE;
    stream_wait(s, s->issued); /* a real one returns at once and frees later */
    pthread_mutex_lock(&cuda_lock);
    for (struct stream **at = &s->ctx->streams; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    pthread_mutex_unlock(&cuda_lock);
    free(s);
    return CUDA_SUCCESS;
}

API CUresult cuStreamGetPriority(CUstream stream, int *priority)
{
    struct stream *s;
    CUresult r = find(stream, &s);
    if (!r)
        *priority = s->priority;
    return r;
}

/* ---- events: a place in a stream ---- */

API CUresult cuEventCreate(CUevent *event, unsigned flags)
{
    struct event *e = calloc(1, sizeof *e);
    if (!e || !(e->stamp_ns = calloc(1, sizeof *e->stamp_ns)))
        return CUDA_ERROR_OUT_OF_MEMORY;
    *event = e;
    return cuda_ready();
}

API CUresult cuEventDestroy_v2(CUevent event)
{
    if (event->stream)
        stream_wait(event->stream, event->value); /* the stamp may still be on its way */
    free(event->stamp_ns);
    free(event);
    return CUDA_SUCCESS;
}

API CUresult cuEventRecord(CUevent event, CUstream stream)
{
    struct stream *s;
    CUresult r = find(stream, &s);
    struct fakenv_entry e = {.op = OP_STAMP, .arg = {(uintptr_t)event->stamp_ns}};
    if (!r && !(r = stream_issue(s, s->channel, &e, NULL, 0)))
        event->stream = s, event->value = s->issued;
    return r;
}

API CUresult cuEventQuery(CUevent event)
{
    CUresult r = context_error();
    if (r || !event->stream)
        return r;
    return atomic_load(&event->stream->done) >= event->value ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

API CUresult cuEventSynchronize(CUevent event)
{
    return event->stream ? stream_wait(event->stream, event->value) : CUDA_SUCCESS;
}

API CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end)
{
    if (!start->stream || !end->stream)
        return CUDA_ERROR_INVALID_HANDLE;
    if (cuEventQuery(start) || cuEventQuery(end))
        return CUDA_ERROR_NOT_READY;
    *milliseconds = (float)((double)(*end->stamp_ns - *start->stamp_ns) / 1e6);
    return CUDA_SUCCESS;
}

API CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags)
{
    struct stream *s;
    CUresult r = find(stream, &s);
    struct fakenv_entry e = {.op = OP_NOP};
    return r || !event->stream ? r : stream_issue(s, s->channel, &e, event->stream, event->value);
}

API CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value, unsigned flags)
{
    struct stream *s;
    CUresult r = find(stream, &s);
    struct fakenv_entry e = {.op = OP_STORE32, .arg = {address, value}};
    return r ? r : stream_issue(s, s->channel, &e, NULL, 0);
}

API CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value, unsigned flags)
{
    struct stream *s;
    CUresult r = find(stream, &s);
    struct fakenv_entry e = {.op = OP_WAIT32, .arg = {address, value, flags & 1}};
    return r || flags > 1 ? (r ? r : CUDA_ERROR_NOT_SUPPORTED) : stream_issue(s, s->channel, &e, NULL, 0);
}
