/* SPDX-License-Identifier: Apache-2.0
 *
 * The tree of RM objects of this process, as far as it matters for pausing: clients, devices,
 * subdevices, channel groups, channels.  Called by the process's own threads; `lock` is theirs
 * alone.  The control loop and the agent read only the table, where every channel is one slot
 * that appears and disappears by a single store, so a process stopped in here leaves no
 * half-written channel.
 */
#include "gpu.h"
#include "nv_abi.h"
#include "sys.h"

#include <pthread.h>

#define OBJECTS_MAX 8192u

struct object {
    uint32_t client, handle, parent, hclass, engine;
    uint32_t freeing; /* token of the FREE that is under way; 0: none */
    int file, slot;   /* slot in the table, or -1 */
    int used;
};

union valve_gpu_memory valve_gpu_memory __attribute__((aligned(4096)));
static struct object objects[OBJECTS_MAX];
static uint32_t count; /* objects beyond were never used */
static uint32_t tokens;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct object *find(uint32_t client, uint32_t handle)
{
    for (uint32_t i = 0; i < count; i++)
        if (objects[i].used && !objects[i].freeing && objects[i].client == client && objects[i].handle == handle)
            return &objects[i];
    return NULL;
}

static struct object *add(void)
{
    for (uint32_t i = 0; i < OBJECTS_MAX; i++)
        if (!objects[i].used) {
            if (i >= count)
                count = i + 1;
            return &objects[i];
        }
    return NULL;
}

void gpu_table_touched(void) { __atomic_fetch_add(&GPU_TABLE->changes, 1, __ATOMIC_SEQ_CST); }

static uint32_t subdevice_of(const struct object *channel)
{
    const struct object *above = channel;
    for (int depth = 0; depth < 8 && above && above->hclass != NV_DEVICE; depth++)
        above = find(channel->client, above->parent);
    for (uint32_t i = 0; above && i < count; i++)
        if (objects[i].used && objects[i].hclass == NV_SUBDEVICE && objects[i].client == channel->client &&
            objects[i].parent == above->handle)
            return objects[i].handle;
    return 0;
}

static void publish(struct object *channel)
{
    struct valve_gpu_table *table = GPU_TABLE;
    const struct object *parent = find(channel->client, channel->parent);
    int in_group = parent && parent->hclass == NV_CHANNEL_GROUP;
    for (uint32_t i = 0; i < VALVE_GPU_CHANNELS_MAX; i++) {
        struct valve_gpu_channel *slot = &table->channels[i];
        if (__atomic_load_n(&slot->state, __ATOMIC_SEQ_CST))
            continue;
        slot->file = (uint32_t)channel->file;
        slot->client = channel->client;
        slot->subdevice = subdevice_of(channel);
        slot->group = in_group ? parent->handle : 0;
        slot->channel = channel->handle;
        slot->engine = in_group ? parent->engine : channel->engine;
        slot->hclass = channel->hclass;
        channel->slot = (int)i;
        __atomic_store_n(&slot->state, 1, __ATOMIC_SEQ_CST);
        if (i >= table->slots)
            __atomic_store_n(&table->slots, i + 1, __ATOMIC_SEQ_CST);
        gpu_table_touched();
        return;
    }
    channel->slot = -1;
    __atomic_fetch_add(&table->overflow, 1, __ATOMIC_SEQ_CST);
    gpu_table_touched();
}

static void withdraw(struct object *channel)
{
    if (channel->slot < 0)
        return;
    __atomic_store_n(&GPU_TABLE->channels[channel->slot].state, 0, __ATOMIC_SEQ_CST);
    channel->slot = -1;
    gpu_table_touched();
}

void gpu_object_added(const struct gpu_new *new)
{
    pthread_mutex_lock(&lock);
    struct object *object = add();
    if (object) {
        *object = (struct object){new->client, new->object, new->parent, new->hclass, new->engine, 0, new->file, -1, 1};
        if (nv_is_channel(new->hclass))
            publish(object);
    } else {
        __atomic_fetch_add(&GPU_TABLE->overflow, 1, __ATOMIC_SEQ_CST);
        gpu_table_touched();
    }
    pthread_mutex_unlock(&lock);
}

void gpu_object_dupped(uint32_t client, uint32_t parent, uint32_t object, uint32_t source_client, uint32_t source, int file)
{
    pthread_mutex_lock(&lock);
    const struct object *from = find(source_client, source);
    struct gpu_new copy = {client, parent, object, from ? from->hclass : 0, from ? from->engine : 0, file};
    pthread_mutex_unlock(&lock);
    if (from && !nv_is_channel(copy.hclass)) /* channels cannot be copied */
        gpu_object_added(&copy);
}

/* Mark the object and all below it; channels leave the table before the driver frees them, so
 * that a handle used anew is never taken for the old channel. */
static void mark(uint32_t client, uint32_t handle, uint32_t token, int whole_client)
{
    for (uint32_t i = 0; i < count; i++) {
        struct object *o = &objects[i];
        if (!o->used || o->freeing || o->client != client)
            continue;
        if (whole_client || o->handle == handle) {
            o->freeing = token;
            withdraw(o);
        }
    }
    for (int grew = !whole_client; grew;) {
        grew = 0;
        for (uint32_t i = 0; i < count; i++) {
            struct object *o = &objects[i];
            if (!o->used || o->freeing || o->client != client)
                continue;
            for (uint32_t k = 0; k < count && !o->freeing; k++)
                if (objects[k].used && objects[k].freeing == token && objects[k].handle == o->parent) {
                    o->freeing = token;
                    withdraw(o);
                    grew = 1;
                }
        }
    }
}

uint32_t gpu_object_freeing(uint32_t client, uint32_t object)
{
    uint32_t token = 0;
    pthread_mutex_lock(&lock);
    if (find(client, object)) {
        token = ++tokens ? tokens : ++tokens;
        mark(client, object, token, object == client);
    }
    pthread_mutex_unlock(&lock);
    return token;
}

void gpu_object_freed(uint32_t token, int is_done)
{
    if (token == 0)
        return;
    pthread_mutex_lock(&lock);
    for (uint32_t i = 0; i < count; i++) {
        struct object *o = &objects[i];
        if (!o->used || o->freeing != token)
            continue;
        o->freeing = 0;
        if (is_done)
            o->used = 0;
    }
    /* The driver refused: they are still there, and may compute.  Not what another thread is freeing. */
    for (uint32_t i = 0; !is_done && i < count; i++)
        if (objects[i].used && !objects[i].freeing && nv_is_channel(objects[i].hclass) && objects[i].slot < 0)
            publish(&objects[i]);
    while (count > 0 && !objects[count - 1].used)
        count--;
    pthread_mutex_unlock(&lock);
}

void gpu_objects_of_file_gone(int file)
{
    pthread_mutex_lock(&lock);
    for (uint32_t i = 0; i < count; i++)
        if (objects[i].used && objects[i].file == file) {
            withdraw(&objects[i]);
            objects[i].used = 0;
        }
    pthread_mutex_unlock(&lock);
}

/* The child has the same open files and so the same objects, but the channels are its
 * parent's to list; what it makes below them from now on is its own. */
void gpu_objects_forked(void)
{
    pthread_mutex_init(&lock, NULL); /* another thread of the parent may have held it */
    for (uint32_t i = 0; i < count; i++) {
        objects[i].freeing = 0;
        objects[i].slot = -1;
        if (nv_is_channel(objects[i].hclass))
            objects[i].used = 0;
    }
}
