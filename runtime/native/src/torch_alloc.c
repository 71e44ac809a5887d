/* SPDX-License-Identifier: Apache-2.0
 *
 * An allocator over the arena, with the signatures that torch's CUDAPluggableAllocator calls:
 * what is allocated in a MemPool of it (valve_runtime/torch_pool.py) lies in the arena.  Meant
 * for an engine's KV cache: few, large, long-lived pieces, each starting at a slab so that a
 * slab belongs to one of them.  Nothing is mapped here: that is for grants.
 *
 * Threads: any; a lock that the control loop never takes.
 */
#include "state.h"

#include <pthread.h>
#include <string.h>
#include <sys/types.h>

#define PIECES_MAX 1024
#define OPEN_TIMEOUT_MS 60000

static struct {
    uint32_t first, count; /* slabs, ordered by `first` */
} pieces[PIECES_MAX];
static uint32_t piece_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* First fit between the pieces there are; -1: no room. */
static int64_t place(uint32_t count, uint32_t slabs)
{
    uint32_t at = 0, n = 0;
    if (piece_count == PIECES_MAX)
        return -1;
    for (; n < piece_count && pieces[n].first - at < count; n++)
        at = pieces[n].first + pieces[n].count;
    if (slabs - at < count)
        return -1;
    memmove(&pieces[n + 1], &pieces[n], (piece_count - n) * sizeof pieces[0]);
    pieces[n].first = at;
    pieces[n].count = count;
    piece_count++;
    return at;
}

void *valve_torch_alloc(ssize_t bytes, int device, void *stream)
{
    uint64_t slab_bytes;
    uint32_t slabs;
    char *base = valve_arena_open(0, OPEN_TIMEOUT_MS, &slab_bytes, &slabs);
    (void)device, (void)stream;
    if (base == NULL || bytes <= 0 || (uint64_t)bytes > slabs * slab_bytes) {
        if (base != NULL)
            VALVE_SET_ERROR("the arena has no room for a tensor of that size: give the tenant more memory, or the "
                            "engine less KV cache");
        VALVE_SAY("no memory of the arena for torch: ", valve_last_error());
        return NULL; /* torch says that it is out of memory */
    }
    pthread_mutex_lock(&lock);
    int64_t first = place((uint32_t)(((uint64_t)bytes + slab_bytes - 1) / slab_bytes), slabs);
    pthread_mutex_unlock(&lock);
    return first < 0 ? NULL : base + (uint64_t)first * slab_bytes;
}

void valve_torch_free(void *at, ssize_t bytes, int device, void *stream)
{
    (void)bytes, (void)device, (void)stream;
    if (at == NULL || valve.base == NULL)
        return;
    uint32_t first = (uint32_t)(((char *)at - valve.base) / (int64_t)valve.slab_bytes);
    pthread_mutex_lock(&lock);
    for (uint32_t n = 0; n < piece_count; n++)
        if (pieces[n].first == first) {
            memmove(&pieces[n], &pieces[n + 1], (--piece_count - n) * sizeof pieces[0]);
            break;
        }
    pthread_mutex_unlock(&lock);
}
