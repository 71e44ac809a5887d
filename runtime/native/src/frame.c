/* SPDX-License-Identifier: Apache-2.0
 * Judgement of what comes over the wire: see frame.h. */
#include "frame.h"

static const struct {
    uint16_t size;
    uint8_t descriptors_min, descriptors_max;
} FROM_AGENT[] = {
    [VALVE_WELCOME] = {sizeof(struct valve_welcome), 1, 2},
    [VALVE_REJECT] = {sizeof(struct valve_reject), 0, 0},
    [VALVE_ARENA] = {sizeof(struct valve_arena), 3, 3},
    [VALVE_GRANT] = {sizeof(struct valve_slabs), 0, 0},
    [VALVE_RECLAIM] = {sizeof(struct valve_slabs), 0, 0},
    [VALVE_DENIED] = {sizeof(struct valve_reject), 0, 0},
};

static int welcome_check(const struct valve_welcome *frame)
{
    int role = frame->role == VALVE_ROLE_ONLINE || frame->role == VALVE_ROLE_OFFLINE;
    int device = frame->device == VALVE_DEVICE_CPU || frame->device == VALVE_DEVICE_NVIDIA;
    int slab = frame->slab_bytes >= 4096 && frame->slab_bytes % 4096 == 0 && frame->slab_bytes <= 1ull << 36;
    return role && device && slab && frame->lease_ms > 0 && frame->lease_ms <= 3600000;
}

static int arena_check(const struct valve_arena *frame)
{
    if (frame->slabs == 0 || frame->slabs > VALVE_SLABS_MAX)
        return 0;
    if (frame->slab_bytes < 4096 || frame->slab_bytes % 4096 != 0 || frame->slab_bytes > 1ull << 36)
        return 0;
    if (frame->quarantine_bytes < 4096 || frame->quarantine_bytes % 4096 != 0 ||
        frame->slab_bytes % frame->quarantine_bytes != 0)
        return 0;
    return frame->ledger_bytes >= VALVE_LEDGER_BYTES(frame->slabs) && frame->ledger_bytes < 1ull << 32;
}

static int text_check(const struct valve_reject *frame)
{
    return frame->text[VALVE_TEXT_BYTES - 1] == 0;
}

int valve_frame_check(const void *bytes, size_t size, int descriptors)
{
    struct valve_header header;
    if (size < sizeof header)
        return FRAME_TRUNCATED;
    __builtin_memcpy(&header, bytes, sizeof header);
    if (header.magic != VALVE_MAGIC)
        return FRAME_MAGIC;
    if (header.type >= sizeof FROM_AGENT / sizeof FROM_AGENT[0] || FROM_AGENT[header.type].size == 0)
        return FRAME_TYPE;
    /* A refusal must be understood whatever version the agent speaks. */
    if (header.type != VALVE_REJECT && (header.version < VALVE_VERSION_MIN || header.version > VALVE_VERSION_MAX))
        return FRAME_VERSION;
    size_t want = FROM_AGENT[header.type].size;
    if (size < want || header.size < want)
        return FRAME_TRUNCATED;
    if (size > want || header.size > want)
        return FRAME_OVERSIZED;
    if (descriptors < FROM_AGENT[header.type].descriptors_min ||
        descriptors > FROM_AGENT[header.type].descriptors_max)
        return FRAME_DESCRIPTORS;
    int good = 1;
    switch (header.type) {
    case VALVE_WELCOME: good = welcome_check(bytes); break;
    case VALVE_ARENA: good = arena_check(bytes); break;
    case VALVE_REJECT:
    case VALVE_DENIED: good = text_check(bytes); break;
    default: break;
    }
    return good ? header.type : FRAME_FIELD;
}

const char *valve_frame_sentence(int error)
{
    switch (error) {
    case FRAME_TRUNCATED: return "a frame from the agent is too short";
    case FRAME_OVERSIZED: return "a frame from the agent is too long";
    case FRAME_MAGIC: return "what answers at VALVE_SOCKET is no Valve agent";
    case FRAME_TYPE: return "the agent sent a frame of a type that this version does not know";
    case FRAME_VERSION: return "the agent speaks another version of the protocol: update Valve on the node or in the pod";
    case FRAME_DESCRIPTORS: return "a frame from the agent came with a wrong number of descriptors";
    case FRAME_FIELD: return "a frame from the agent has a field with an impossible value";
    default: return "no error";
    }
}

void valve_frame_header(struct valve_header *header, int type, size_t size, uint32_t seq)
{
    header->magic = VALVE_MAGIC;
    header->version = VALVE_VERSION_MAX;
    header->type = (uint16_t)type;
    header->size = (uint32_t)size;
    header->seq = seq;
}

uint32_t valve_bitmap_run(const struct valve_bitmap *set, uint32_t from, uint32_t end, uint32_t *past)
{
    while (from < end && !valve_bitmap_has(set, from))
        from = from % 64 == 0 && set->words[from / 64] == 0 ? from + 64 : from + 1;
    if (from > end)
        from = end;
    uint32_t last = from;
    while (last < end && valve_bitmap_has(set, last))
        last++;
    *past = last;
    return from;
}
