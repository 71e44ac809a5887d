/* SPDX-License-Identifier: Apache-2.0
 *
 * The resource manager: clients and their object trees. Order of checks as in the driver: class
 * known, parameter size, client exists, client belongs to this file, parent exists and fits.
 */
#define _GNU_SOURCE
#include <limits.h>
#include <linux/capability.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fake.h"

enum { CLIENT_BASE = 0xc1d00000, OBJECT_BASE = 0x5c000000, SHARE_TYPE_CLIENT = 3, SHARE_REVOKE = 1 };

struct client *client_find(uint32_t handle)
{
    for (struct client *c = machine.clients; c; c = c->next)
        if (c->handle == handle)
            return c;
    return NULL;
}

struct object *object_find(struct client *client, uint32_t handle)
{
    for (struct object *o = client->objects; o; o = o->next)
        if (o->handle == handle)
            return o;
    return NULL;
}

uint32_t client_validate(const struct client *client, const struct caller *caller)
{
    if (!client)
        return NV_ERR_INVALID_CLIENT;
    if (client->owner == caller->file)
        return NV_OK;
    if (machine.validate == VALIDATE_PATCHED && remote_capable(caller->tid, CAP_SYS_ADMIN))
        return NV_OK;
    return NV_ERR_INVALID_CLIENT;
}

struct object *object_add(struct client *client, uint32_t *handle, uint32_t parent, uint32_t hclass,
                          enum object_kind kind, uint32_t *status)
{
    if (*handle == 0)
        while (object_find(client, *handle = client->next_handle++))
            ;
    else if (*handle == client->handle || object_find(client, *handle)) {
        *status = NV_ERR_INSERT_DUPLICATE_NAME;
        return NULL;
    }
    struct object *o = calloc(1, sizeof *o);
    if (!o)
        abort();
    o->handle = *handle;
    o->parent = parent;
    o->hclass = hclass;
    o->kind = kind;
    o->next = client->objects;
    client->objects = o;
    *status = NV_OK;
    return o;
}

static void tsg_put(struct tsg *tsg)
{
    if (tsg && --tsg->refs == 0)
        free(tsg);
}

static void channel_free(struct channel *channel)
{
    channel->stopped = true;
    channel_apply(channel);
    if (channel->engine) {
        struct fakenv_slot *slot = &channel->engine->shared->slot[channel->token];
        atomic_store(&slot->abort, 1);
        atomic_fetch_add(&slot->bell, 1);
        syscall(SYS_futex, &slot->bell, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
        channel->engine->slots_used[channel->token / 64] &= ~(1ull << channel->token % 64);
    }
    channel_wait_evicted(channel);
    for (struct channel **at = &machine.channels; *at; at = &(*at)->next_all)
        if (*at == channel) {
            *at = channel->next_all;
            break;
        }
    engine_put(channel->engine);
    tsg_put(channel->tsg);
    free(channel);
}

/* Frees the object and everything below it. */
static void object_free(struct client *client, uint32_t handle)
{
    struct object *child;
    do { /* each free changes the list: look again from its head */
        for (child = client->objects; child && child->parent != handle; child = child->next)
            ;
        if (child)
            object_free(client, child->handle);
    } while (child);
    for (struct object **at = &client->objects; *at; at = &(*at)->next)
        if ((*at)->handle == handle) {
            struct object *o = *at;
            *at = o->next;
            if (o->kind == OBJ_TSG)
                tsg_put(o->tsg);
            else if (o->kind == OBJ_CHANNEL)
                channel_free(o->channel);
            else if (o->kind == OBJ_MEMORY)
                memory_put(o->memory);
            free(o);
            return;
        }
}

void client_free(struct client *client)
{
    while (client->objects)
        object_free(client, client->objects->handle);
    for (struct client **at = &machine.clients; *at; at = &(*at)->next)
        if (*at == client) {
            *at = client->next;
            break;
        }
    free(client);
}

static void alloc_root(const struct caller *caller, struct nvos64 *p)
{
    uint32_t handle = p->object;
    for (uint32_t h = CLIENT_BASE + 1; handle == 0; h++)
        if (!client_find(h))
            handle = h;
    if (client_find(handle)) {
        p->status = NV_ERR_INSERT_DUPLICATE_NAME;
        return;
    }
    struct client *client = calloc(1, sizeof *client);
    if (!client)
        abort();
    client->handle = p->object = handle;
    client->next_handle = OBJECT_BASE;
    client->owner = caller->file;
    client->pid = remote_tgid(caller->tid);
    client->next = machine.clients;
    machine.clients = client;
    p->hclass = NV01_ROOT_CLIENT;
    p->status = NV_OK;
}

static bool is_channel(uint32_t hclass)
{
    return hclass == TURING_CHANNEL_GPFIFO || hclass == AMPERE_CHANNEL_GPFIFO ||
           hclass == HOPPER_CHANNEL_GPFIFO || hclass == BLACKWELL_CHANNEL_GPFIFO_A ||
           hclass == BLACKWELL_CHANNEL_GPFIFO_B;
}

/* The engine of the process: the one attached on a UVM file that this process opened. */
static struct engine *engine_of(pid_t pid)
{
    struct engine *engine = NULL;
    pthread_mutex_lock(&files_lock);
    for (struct file *f = machine.files; f && !engine; f = f->next)
        if (f->kind == FILE_UVM && f->pid == pid)
            engine = f->engine;
    pthread_mutex_unlock(&files_lock);
    return engine;
}

static uint32_t channel_new(struct client *client, struct object *o, struct object *parent,
                            const struct nv_channel_params *params)
{
    struct channel *ch = calloc(1, sizeof *ch);
    if (!ch)
        abort();
    ch->client = client->handle;
    ch->handle = o->handle;
    ch->gpu = parent->gpu;
    ch->cilp = 2;
    ch->engine_type = params->engine;
    ch->token = FAKENV_SLOTS + machine.next_token++; /* no slot: a number that is never one */
    if (parent->kind == OBJ_TSG) {
        ch->tsg = parent->tsg;
        ch->tsg->refs++;
        ch->engine_type = ch->tsg->engine_type;
    }
    struct engine *engine = engine_of(client->pid);
    unsigned word = 0;
    while (engine && word < FAKENV_SLOTS / 64 && engine->slots_used[word] == UINT64_MAX)
        word++;
    if (engine && word < FAKENV_SLOTS / 64) {
        ch->token = 64 * word + (unsigned)__builtin_ctzll(~engine->slots_used[word]);
        ch->engine = engine;
        engine->refs++;
        engine->slots_used[word] |= 1ull << ch->token % 64;
    }
    ch->next_all = machine.channels;
    machine.channels = ch;
    o->channel = ch;
    if (ch->engine) {
        channel_apply(ch);
        struct engine_command start = {.op = ENGINE_START_SLOT, .slot = ch->token};
        return engine_call(engine, &start, -1);
    }
    return NV_OK;
}

static uint32_t memory_new(struct client *client, struct object *o, unsigned gpu, uint64_t bytes)
{
    if (bytes == 0 || machine.used_bytes[gpu] + bytes > machine.gpu_bytes)
        return bytes ? NV_ERR_NO_MEMORY : NV_ERR_INVALID_ARGUMENT;
    int fd = memfd_create("fakenv-vidmem", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
        return NV_ERR_NO_MEMORY;
    struct memory *memory = calloc(1, sizeof *memory);
    if (!memory)
        abort();
    *memory = (struct memory){.refs = 1, .gpu = gpu, .bytes = bytes, .fd = fd, .pid = client->pid};
    machine.used_bytes[gpu] += bytes;
    o->memory = memory;
    return NV_OK;
}

struct class_rule { uint32_t hclass, parent_class; enum object_kind kind; unsigned size; };

/* What may be allocated under what; 0 as a size: no parameters are looked at. */
static bool class_rule(uint32_t hclass, struct class_rule *rule)
{
    const struct branch *b = machine.branch;
    const struct class_rule rules[] = {
        {NV01_DEVICE_0, NV01_ROOT_CLIENT, OBJ_DEVICE, 56},
        {NV20_SUBDEVICE_0, NV01_DEVICE_0, OBJ_SUBDEVICE, 4},
        {FERMI_VASPACE_A, NV01_DEVICE_0, OBJ_VASPACE, b->vaspace_params},
        {NV01_MEMORY_LOCAL_USER, NV01_DEVICE_0, OBJ_MEMORY, b->memory_params},
        {KEPLER_CHANNEL_GROUP_A, NV01_DEVICE_0, OBJ_TSG, sizeof(struct nv_tsg_params)},
        {FERMI_CONTEXT_SHARE_A, KEPLER_CHANNEL_GROUP_A, OBJ_OTHER, 12},
        {TURING_USERMODE_A, NV20_SUBDEVICE_0, OBJ_OTHER, 0},
        {HOPPER_USERMODE_A, NV20_SUBDEVICE_0, OBJ_OTHER, 0},
    };
    for (unsigned i = 0; i < sizeof rules / sizeof *rules; i++)
        if (rules[i].hclass == hclass) {
            *rule = rules[i];
            return true;
        }
    *rule = (struct class_rule){hclass, 0, OBJ_CHANNEL, b->channel_params};
    return is_channel(hclass);
}

static uint32_t alloc_object(const struct caller *caller, struct nvos64 *p)
{
    struct class_rule rule;
    _Alignas(8) uint8_t params[512] = {0};
    uint32_t value, status;
    uint64_t bytes;

    if (!class_rule(p->hclass, &rule))
        return NV_ERR_INVALID_CLASS;
    /* 0 means "as long as the class says", which older user space relies on */
    if (p->params_size && rule.size && p->params_size != rule.size)
        return NV_ERR_INVALID_PARAM_STRUCT;
    struct client *client = client_find(p->root);
    if ((status = client_validate(client, caller)) != NV_OK)
        return status;
    if (rule.size && p->params && !remote_read(caller->tid, p->params, params, rule.size))
        return NV_ERR_INVALID_ADDRESS;

    struct object root = {.hclass = NV01_ROOT_CLIENT};
    struct object *parent = p->parent == p->root ? &root : object_find(client, p->parent);
    if (!parent)
        return NV_ERR_OBJECT_NOT_FOUND;
    bool fits = rule.kind == OBJ_CHANNEL ? parent->kind == OBJ_TSG || parent->kind == OBJ_DEVICE
                                         : parent->hclass == rule.parent_class;
    if (!fits)
        return NV_ERR_INVALID_OBJECT_PARENT;
    unsigned gpu = parent->gpu;
    memcpy(&value, params, sizeof value);
    if (rule.kind == OBJ_DEVICE) {
        gpu = value;
        if (gpu >= machine.gpus)
            return NV_ERR_INVALID_DEVICE;
    }
    if (rule.kind == OBJ_SUBDEVICE && value != 0)
        return NV_ERR_INVALID_ARGUMENT;
    struct object *o = object_add(client, &p->object, p->parent, p->hclass, rule.kind, &status);
    if (!o)
        return status;
    o->gpu = gpu;
    if (rule.kind == OBJ_TSG) {
        o->tsg = calloc(1, sizeof *o->tsg);
        if (!o->tsg)
            abort();
        *o->tsg = (struct tsg){.refs = 1, .gpu = gpu, .id = machine.next_tsg++, .timeslice_us = 2000};
        o->tsg->engine_type = ((struct nv_tsg_params *)(void *)params)->engine;
    } else if (rule.kind == OBJ_CHANNEL) {
        struct nv_channel_params channel;
        memcpy(&channel, params, sizeof channel);
        status = channel_new(client, o, parent, &channel);
    } else if (rule.kind == OBJ_MEMORY) {
        memcpy(&bytes, params + NV_MEMORY_SIZE_OFFSET, sizeof bytes);
        status = memory_new(client, o, gpu, bytes);
        if (status != NV_OK)
            o->kind = OBJ_OTHER;
    }
    if (status != NV_OK)
        object_free(client, p->object);
    return status;
}

void rm_alloc(const struct caller *caller, struct nvos64 *p)
{
    if ((p->status = knobs_rule(true, p->hclass)) != NV_OK)
        return;
    if (p->hclass == NV01_ROOT || p->hclass == NV01_ROOT_NON_PRIV || p->hclass == NV01_ROOT_CLIENT)
        alloc_root(caller, p);
    else
        p->status = alloc_object(caller, p);
}

void rm_free(const struct caller *caller, struct nvos00 *p)
{
    struct client *client = client_find(p->root ? p->root : p->object);
    if ((p->status = client_validate(client, caller)) != NV_OK)
        return;
    if (p->object == client->handle)
        client_free(client);
    else if (object_find(client, p->object))
        object_free(client, p->object);
    else
        p->status = NV_ERR_OBJECT_NOT_FOUND;
}

/* Memory and channel groups can be copied, channels cannot. The default share policy is "same
 * process"; anything further needs an RM_SHARE of the source object to the destination client. */
void rm_dup(const struct caller *caller, struct nvos55 *p)
{
    struct client *to = client_find(p->client), *from = client_find(p->src_client);
    if ((p->status = client_validate(to, caller)) != NV_OK)
        return;
    struct object *source = from ? object_find(from, p->src_object) : NULL;
    if (!source) {
        p->status = from ? NV_ERR_OBJECT_NOT_FOUND : NV_ERR_INVALID_CLIENT;
        return;
    }
    if (from->pid != to->pid && source->shared_with != to->handle) {
        p->status = NV_ERR_INSUFFICIENT_PERMISSIONS;
        return;
    }
    if (source->kind != OBJ_MEMORY && source->kind != OBJ_TSG) {
        p->status = NV_ERR_INVALID_ARGUMENT;
        return;
    }
    struct object *parent = object_find(to, p->parent);
    if (!parent || parent->kind != OBJ_DEVICE) {
        p->status = NV_ERR_INVALID_OBJECT_PARENT;
        return;
    }
    struct object *o = object_add(to, &p->object, p->parent, source->hclass, source->kind, &p->status);
    if (!o)
        return;
    o->gpu = source->gpu;
    if (source->kind == OBJ_MEMORY)
        (o->memory = source->memory)->refs++;
    else
        (o->tsg = source->tsg)->refs++;
}

void rm_share(const struct caller *caller, struct nvos57 *p)
{
    struct client *client = client_find(p->client);
    if ((p->status = client_validate(client, caller)) != NV_OK)
        return;
    struct object *o = object_find(client, p->object);
    if (!o)
        p->status = NV_ERR_OBJECT_NOT_FOUND;
    else if (p->type != SHARE_TYPE_CLIENT)
        p->status = NV_ERR_NOT_SUPPORTED; /* other share types are not modelled */
    else
        o->shared_with = p->action & SHARE_REVOKE ? 0 : p->target;
}
