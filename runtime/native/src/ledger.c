/* SPDX-License-Identifier: Apache-2.0
 *
 * The ownership ledger, written by one engine thread.  The copy that is not in force
 * is filled, then `active` is stored: a writer stopped anywhere leaves a whole copy.
 */
#include "state.h"

#include <string.h>

#define OWNER_WORDS (VALVE_REQUESTS_MAX / 64)

static struct {
    uint32_t *tokens;
    uint64_t *pinned;
    uint64_t (*owners)[OWNER_WORDS];
    uint32_t copy;
} draft; /* tokens == NULL: no update is under way */

int valve_ledger_begin(void)
{
    draft.tokens = NULL;
    if (atomic_load(&valve.arena) != ARENA_READY)
        return -1;
    draft.copy = 1 - (__atomic_load_n(&valve.ledger->active, __ATOMIC_RELAXED) & 1);
    uint64_t copy_bytes = VALVE_LEDGER_COPY_BYTES(valve.slabs);
    char *at = (char *)(valve.ledger + 1) + draft.copy * copy_bytes;
    memset(at, 0, copy_bytes);
    draft.tokens = (uint32_t *)at;
    draft.pinned = (uint64_t *)(at + 4 * VALVE_REQUESTS_MAX);
    draft.owners = (uint64_t(*)[OWNER_WORDS])(draft.pinned + VALVE_BITMAP_WORDS);
    return 0;
}

void valve_ledger_request(uint32_t slot, uint32_t tokens)
{
    if (draft.tokens && slot < VALVE_REQUESTS_MAX)
        draft.tokens[slot] = tokens;
}

void valve_ledger_own(uint32_t slab, uint32_t slot)
{
    if (draft.tokens && slab < valve.slabs && slot < VALVE_REQUESTS_MAX)
        draft.owners[slab][slot / 64] |= 1ull << (slot % 64);
}

void valve_ledger_pin(uint32_t slab)
{
    if (draft.tokens && slab < valve.slabs)
        draft.pinned[slab / 64] |= 1ull << (slab % 64);
}

void valve_ledger_commit(void)
{
    if (!draft.tokens)
        return;
    draft.tokens = NULL;
    __atomic_store_n(&valve.ledger->active, draft.copy, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&valve.ledger->updates, 1, __ATOMIC_SEQ_CST);
}
