/* SPDX-License-Identifier: Apache-2.0
 *
 * NV_ESC_RM_CONTROL: the table of controls with privilege, size and class as in the driver's export
 * tables, and what each one does. Order of checks as in the driver: client exists, size of a known
 * control, client belongs to this file, object, control known to that class, privilege.
 */
#define _GNU_SOURCE
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

enum privilege { USER, ROOT, NICE, KERNEL, INTERNAL };
enum on { ON_CLIENT, ON_DEVICE, ON_SUBDEVICE, ON_TSG, ON_CHANNEL };
enum { SIZE_SCHEDULE = -1, SIZE_PROBED = -2, SIZE_NAME = -3, MAX_PARAMS = 1024 };

static const struct control {
    uint32_t cmd;
    enum on on;
    enum privilege privilege;
    int size;
} controls[] = {
    {CTRL_GPU_GET_ATTACHED_IDS, ON_CLIENT, USER, 128},
    {CTRL_GPU_GET_PROBED_IDS, ON_CLIENT, USER, SIZE_PROBED},
    {CTRL_GPU_ATTACH_IDS, ON_CLIENT, USER, 132},
    {CTRL_EXPORT_OBJECT_TO_FD, ON_CLIENT, USER, sizeof(struct ctrl_export)},
    {CTRL_IMPORT_OBJECT_FROM_FD, ON_CLIENT, USER, sizeof(struct ctrl_import)},
    {CTRL_GPU_GET_UUID_INFO, ON_CLIENT, USER, 272},
    {CTRL_SET_CHANNEL_PROPERTIES, ON_DEVICE, USER, 16},
    {CTRL_STOP_RUNLIST, ON_DEVICE, ROOT, 4},
    {CTRL_START_RUNLIST, ON_DEVICE, ROOT, 4},
    {CTRL_GPU_GET_NAME_STRING, ON_SUBDEVICE, USER, SIZE_NAME},
    {CTRL_GPU_GET_GID_INFO, ON_SUBDEVICE, USER, 268},
    {CTRL_DISABLE_CHANNELS, ON_SUBDEVICE, USER, sizeof(struct ctrl_disable)},
    {CTRL_RUNLIST_SET_SCHED_POLICY, ON_SUBDEVICE, NICE, 8},
    {CTRL_DISABLE_USERMODE_CHANNELS, ON_SUBDEVICE, KERNEL, 1},
    {CTRL_SET_CTXSW_PREEMPTION_MODE, ON_SUBDEVICE, USER, sizeof(struct ctrl_ctxsw_set)},
    {CTRL_GET_CTXSW_MODES, ON_SUBDEVICE, USER, sizeof(struct ctrl_ctxsw_get)},
    {CTRL_RC_SOFT_DISABLE_WATCHDOG, ON_SUBDEVICE, USER, 0},
    {CTRL_TSG_SCHEDULE, ON_TSG, USER, SIZE_SCHEDULE},
    {CTRL_TSG_BIND, ON_TSG, USER, 4},
    {CTRL_TSG_SET_TIMESLICE, ON_TSG, USER, 8},
    {CTRL_TSG_GET_TIMESLICE, ON_TSG, USER, 8},
    {CTRL_TSG_PREEMPT, ON_TSG, USER, sizeof(struct ctrl_preempt)},
    {CTRL_TSG_GET_INFO, ON_TSG, USER, 4},
    {CTRL_TSG_SET_INTERLEAVE, ON_TSG, NICE, 4},
    {CTRL_TSG_MAKE_REALTIME, ON_TSG, NICE, 1},
    {CTRL_TSG_INTERNAL_SCHEDULE, ON_TSG, INTERNAL, SIZE_SCHEDULE},
    {CTRL_TSG_INTERNAL_TIMESLICE, ON_TSG, INTERNAL, 8},
    {CTRL_CHANNEL_SCHEDULE, ON_CHANNEL, USER, SIZE_SCHEDULE},
    {CTRL_CHANNEL_BIND, ON_CHANNEL, USER, 4},
    {CTRL_CHANNEL_SET_INTERLEAVE, ON_CHANNEL, NICE, 4},
    {CTRL_RESTART_RUNLIST, ON_CHANNEL, NICE, 2},
    {CTRL_STOP_CHANNEL, ON_CHANNEL, USER, 1},
    {CTRL_GET_WORK_SUBMIT_TOKEN, ON_CHANNEL, USER, 4},
};

static const struct control *control_find(uint32_t cmd)
{
    for (unsigned i = 0; i < sizeof controls / sizeof *controls; i++)
        if (controls[i].cmd == cmd)
            return &controls[i];
    return NULL;
}

static unsigned size_of(const struct control *c)
{
    switch (c->size) {
    case SIZE_SCHEDULE: return machine.branch->schedule_params;
    case SIZE_PROBED: return machine.branch->probed_ids;
    case SIZE_NAME: return machine.branch->name_string;
    default: return (unsigned)c->size;
    }
}

static uint32_t privilege_check(enum privilege privilege, pid_t tid)
{
    bool allowed = privilege == USER || (privilege == ROOT && remote_capable(tid, CAP_SYS_ADMIN)) ||
                   (privilege == NICE && remote_capable(tid, CAP_SYS_NICE));
    if (privilege == INTERNAL)
        return NV_ERR_NOT_SUPPORTED;
    return allowed ? NV_OK : NV_ERR_INSUFFICIENT_PERMISSIONS;
}

static uint32_t export_object(struct client *client, const struct caller *caller, struct ctrl_export *p)
{
    struct object *o = object_find(client, p->object.object);
    struct file *file = files_find(caller->tid, p->fd);
    if (!o || o->kind != OBJ_MEMORY)
        return NV_ERR_OBJECT_NOT_FOUND;
    if (!file || file->kind != FILE_CTL || file->exported)
        return NV_ERR_INVALID_ARGUMENT;
    file->exported = o->memory;
    o->memory->refs++;
    return NV_OK;
}

static uint32_t import_object(struct client *client, const struct caller *caller, struct ctrl_import *p)
{
    uint32_t status;
    struct file *file = files_find(caller->tid, p->fd);
    struct object *parent = object_find(client, p->object.parent);
    if (!file || !file->exported)
        return NV_ERR_INVALID_ARGUMENT;
    if (!parent || parent->kind != OBJ_DEVICE)
        return NV_ERR_INVALID_OBJECT_PARENT;
    struct object *o = object_add(client, &p->object.object, p->object.parent, NV01_MEMORY_LOCAL_USER,
                                  OBJ_MEMORY, &status);
    if (!o)
        return status;
    o->gpu = file->exported->gpu;
    o->memory = file->exported;
    o->memory->refs++;
    return NV_OK;
}

static uint32_t on_client(struct client *client, const struct caller *caller, uint32_t cmd, uint8_t *params)
{
    uint32_t *ids = (void *)params;
    switch (cmd) {
    case CTRL_GPU_GET_ATTACHED_IDS:
    case CTRL_GPU_GET_PROBED_IDS:
        memset(params, 0xff, cmd == CTRL_GPU_GET_PROBED_IDS ? machine.branch->probed_ids : 128);
        for (unsigned i = 0; i < machine.gpus; i++)
            ids[i] = gpu_id(i);
        return NV_OK;
    case CTRL_EXPORT_OBJECT_TO_FD:
        return export_object(client, caller, (void *)params);
    case CTRL_IMPORT_OBJECT_FROM_FD:
        return import_object(client, caller, (void *)params);
    case CTRL_GPU_GET_UUID_INFO: /* uuid[256], flags (2: binary), gpuId, deviceInstance, subdeviceInstance */
        for (unsigned i = 0; i < machine.gpus; i++) {
            uint8_t uuid[16];
            gpu_uuid(i, uuid);
            if (ids[64] == 2 && !memcmp(params, uuid, sizeof uuid)) {
                ids[65] = gpu_id(i), ids[66] = i, ids[67] = 0;
                return NV_OK;
            }
        }
        return NV_ERR_OBJECT_NOT_FOUND;
    default: /* ATTACH_IDS */
        return NV_OK;
    }
}

static uint32_t ctxsw(struct client *client, uint32_t cmd, uint8_t *params)
{
    struct ctrl_ctxsw_set *set = (void *)params;
    struct ctrl_ctxsw_get *get = (void *)params;
    struct object *o = object_find(client, cmd == CTRL_GET_CTXSW_MODES ? get->channel : set->channel);
    if (!o || o->kind != OBJ_CHANNEL)
        return NV_ERR_OBJECT_NOT_FOUND;
    if (cmd == CTRL_GET_CTXSW_MODES)
        get->cilp = o->channel->cilp;
    else if (set->flags & 1)
        o->channel->cilp = set->cilp;
    return NV_OK;
}

static uint32_t on_subdevice(struct client *client, struct object *o, const struct caller *caller,
                             uint32_t cmd, uint8_t *params)
{
    uint32_t word[3];
    switch (cmd) {
    case CTRL_DISABLE_CHANNELS:
        return sched_disable(caller, (void *)params);
    case CTRL_SET_CTXSW_PREEMPTION_MODE:
    case CTRL_GET_CTXSW_MODES:
        return ctxsw(client, cmd, params);
    case CTRL_GPU_GET_NAME_STRING:
        snprintf((char *)params + 4, 64, "NVIDIA Fake GPU");
        return NV_OK;
    case CTRL_GPU_GET_GID_INFO: /* index, flags, length, data[256]; the binary form only */
        word[0] = 0, word[1] = 2, word[2] = 16;
        memcpy(params, word, sizeof word);
        gpu_uuid(o->gpu, params + 12);
        return NV_OK;
    default: /* sched policy, watchdog: accepted */
        return NV_OK;
    }
}

static uint32_t on_tsg(struct tsg *tsg, uint32_t cmd, uint8_t *params)
{
    switch (cmd) {
    case CTRL_TSG_SCHEDULE:
        sched_set_tsg(tsg, params[0]);
        return NV_OK;
    case CTRL_TSG_SET_TIMESLICE:
        memcpy(&tsg->timeslice_us, params, 8);
        if (tsg->timeslice_us == 0)
            tsg->timeslice_us = 1; /* "off" cannot be said */
        return NV_OK;
    case CTRL_TSG_GET_TIMESLICE:
        memcpy(params, &tsg->timeslice_us, 8);
        return NV_OK;
    case CTRL_TSG_PREEMPT:
        return sched_preempt(tsg, (void *)params);
    case CTRL_TSG_GET_INFO:
        memcpy(params, &tsg->id, 4);
        return NV_OK;
    default: /* bind, interleave, realtime: accepted */
        return NV_OK;
    }
}

static uint32_t on_channel(struct channel *ch, uint32_t cmd, uint8_t *params)
{
    switch (cmd) {
    case CTRL_CHANNEL_SCHEDULE:
        if (ch->tsg)
            return NV_ERR_INVALID_STATE; /* schedule the group */
        ch->scheduled = params[0];
        channel_apply(ch);
        return NV_OK;
    case CTRL_RESTART_RUNLIST:
        return sched_restart_runlist(ch, !params[1]);
    case CTRL_STOP_CHANNEL: /* destructive: nothing brings it back */
        ch->stopped = true;
        channel_apply(ch);
        return channel_wait_evicted(ch) ? NV_OK : NV_ERR_TIMEOUT;
    case CTRL_GET_WORK_SUBMIT_TOKEN:
        memcpy(params, &ch->token, 4);
        return NV_OK;
    default: /* bind, interleave: accepted */
        return NV_OK;
    }
}

static bool fits(const struct object *o, bool is_client, enum on on)
{
    switch (on) {
    case ON_CLIENT: return is_client;
    case ON_DEVICE: return o && o->kind == OBJ_DEVICE;
    case ON_SUBDEVICE: return o && o->kind == OBJ_SUBDEVICE;
    case ON_TSG: return o && o->kind == OBJ_TSG;
    default: return o && o->kind == OBJ_CHANNEL;
    }
}

static uint32_t control(const struct caller *caller, struct nvos54 *p)
{
    static _Alignas(8) uint8_t params[MAX_PARAMS]; /* rm_lock is held */
    const struct control *c = control_find(p->cmd);
    struct client *client = client_find(p->client);
    uint32_t status;

    if (p->cmd == 0)
        return NV_OK;
    if (!client)
        return NV_ERR_INVALID_CLIENT;
    if (p->flags)
        return NV_ERR_INVALID_ARGUMENT;
    if (!p->params_size != !p->params || (c && p->params_size != size_of(c)))
        return NV_ERR_INVALID_ARGUMENT;
    if ((status = client_validate(client, caller)) != NV_OK)
        return status;
    bool is_client = p->object == p->client;
    struct object *o = is_client ? NULL : object_find(client, p->object);
    if (!o && !is_client)
        return NV_ERR_OBJECT_NOT_FOUND;
    if (!c || !fits(o, is_client, c->on))
        return NV_ERR_NOT_SUPPORTED;
    if ((status = privilege_check(c->privilege, caller->tid)) != NV_OK)
        return status;
    if (o && machine.lost[o->gpu])
        return NV_ERR_GPU_IS_LOST;
    if ((status = knobs_rule(false, p->cmd)) != NV_OK)
        return status;
    if (!remote_read(caller->tid, p->params, params, p->params_size))
        return NV_ERR_INVALID_ADDRESS;
    switch (c->on) {
    case ON_CLIENT: status = on_client(client, caller, p->cmd, params); break;
    case ON_DEVICE: status = c->privilege == ROOT ? NV_ERR_NOT_SUPPORTED : NV_OK; break;
    case ON_SUBDEVICE: status = on_subdevice(client, o, caller, p->cmd, params); break;
    case ON_TSG: status = on_tsg(o->tsg, p->cmd, params); break;
    case ON_CHANNEL: status = on_channel(o->channel, p->cmd, params); break;
    }
    if (status == NV_OK && !remote_write(caller->tid, p->params, params, p->params_size))
        return NV_ERR_INVALID_ADDRESS;
    return status;
}

void rm_control(const struct caller *caller, struct nvos54 *p)
{
    p->status = control(caller, p);
}
