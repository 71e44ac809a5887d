/* SPDX-License-Identifier: Apache-2.0
 *
 * Judgement of what comes over the wire: pure functions on bytes, so that a fuzzer
 * can call them a million times.  Called by the control loop.
 */
#ifndef VALVE_FRAME_H
#define VALVE_FRAME_H

#include "valve_protocol.h"

#include <stddef.h>
#include <stdint.h>

#define VALVE_FRAME_MAX 1024u /* room for the largest frame and a bit, to see oversized ones */

enum valve_frame_error {
    FRAME_TRUNCATED = -1,
    FRAME_OVERSIZED = -2,
    FRAME_MAGIC = -3,
    FRAME_TYPE = -4,
    FRAME_VERSION = -5,
    FRAME_DESCRIPTORS = -6,
    FRAME_FIELD = -7,
};

/* enum valve_type of a frame that an agent may send to a runtime, or an error. */
int valve_frame_check(const void *bytes, size_t size, int descriptors);

/* A sentence for an error of valve_frame_check. */
const char *valve_frame_sentence(int error);

/* Fill the header of a frame to send. */
void valve_frame_header(struct valve_header *header, int type, size_t size, uint32_t seq);

static inline int valve_bitmap_has(const struct valve_bitmap *set, uint32_t i)
{
    return (int)(set->words[i / 64] >> (i % 64) & 1);
}

static inline void valve_bitmap_add(struct valve_bitmap *set, uint32_t i)
{
    set->words[i / 64] |= 1ull << (i % 64);
}

/* Next run of members of `set` in [from, end): its first index, and *past one beyond
 * its last; `end` if there is none. */
uint32_t valve_bitmap_run(const struct valve_bitmap *set, uint32_t from, uint32_t end, uint32_t *past);

#endif
