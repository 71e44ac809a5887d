/* SPDX-License-Identifier: Apache-2.0
 *
 * One slab's word: what is so (ACTUAL) and what the engine has been told (TOLD).
 * Events are the difference between the two, so any history fits in one word and no
 * queue can overflow.
 */
#ifndef VALVE_SLAB_H
#define VALVE_SLAB_H

#include <stdint.h>

enum {
    SLAB_ACTUAL = 1,    /* mapped to the arena file */
    SLAB_TOLD = 2,      /* the engine believes that it has the slab */
    SLAB_RELOST = 4,    /* TOLD, lost, and granted anew: LOST then GRANTED are due */
    SLAB_RETURNING = 8, /* ACTUAL, but the engine gave it back: remap and say so */
};

static inline int slab_loss_waits(uint32_t word)
{
    return (word & SLAB_TOLD) && (!(word & SLAB_ACTUAL) || (word & SLAB_RELOST));
}

static inline int slab_grant_waits(uint32_t word)
{
    return (word & SLAB_ACTUAL) && !(word & SLAB_TOLD) && !(word & SLAB_RETURNING);
}

#endif
