/* SPDX-License-Identifier: Apache-2.0
 *
 * /dev/nvidia-uvm: external ranges and what is mapped in them. The list kept here is the truth about
 * who holds memory; the engine of the process makes it true in the address space.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fake.h"

enum { PAGE = 4096, SPARSE_PAGE = 65536 };

uint32_t engine_call(struct engine *engine, const struct engine_command *command, int fd)
{
    char space[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec iov = {(void *)(uintptr_t)command, sizeof *command};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    struct engine_answer answer;
    if (fd >= 0) {
        message.msg_control = space;
        message.msg_controllen = sizeof space;
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        *c = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    if (engine->dead)
        return NV_ERR_INVALID_STATE;
    if (sendmsg(engine->command_fd, &message, MSG_NOSIGNAL) < 0 ||
        recv(engine->command_fd, &answer, sizeof answer, 0) != sizeof answer)
        return NV_ERR_TIMEOUT;
    return answer.error ? NV_ERR_INVALID_ADDRESS : NV_OK;
}

static struct range *range_holding(struct range *list, uint64_t base, uint64_t length)
{
    for (struct range *r = list; r; r = r->next)
        if (base >= r->base && length <= r->length && base - r->base <= r->length - length)
            return r;
    return NULL;
}

static struct range *range_add(struct range **list, struct range range)
{
    struct range *r = malloc(sizeof *r);
    if (!r)
        abort();
    *r = range;
    r->next = *list;
    return *list = r;
}

static bool gpu_running(const struct engine *engine)
{
    if (!engine)
        return false;
    for (int i = 0; i < FAKENV_SLOTS; i++)
        if (atomic_load(&engine->shared->slot[i].state) == ST_RUNNING)
            return true;
    return false;
}

/* Forgets what is mapped in [base, base + length), splitting at the edges. */
static void forget(struct file *file, uint64_t base, uint64_t length)
{
    uint64_t end = base + length;
    bool hit = false;
    for (struct range **at = &file->mapped; *at;) {
        struct range *r = *at, old = *r;
        uint64_t old_end = old.base + old.length;
        if (old_end <= base || old.base >= end) {
            at = &r->next;
            continue;
        }
        hit = true;
        *at = r->next;
        free(r);
        if (old.base < base) {
            struct range left = old;
            left.length = base - old.base;
            if (left.memory)
                left.memory->refs++;
            at = &range_add(at, left)->next;
        }
        if (old_end > end) {
            struct range right = old;
            right.base = end;
            right.length = old_end - end;
            right.offset += end - old.base;
            if (right.memory)
                right.memory->refs++;
            at = &range_add(at, right)->next;
        }
        memory_put(old.memory);
    }
    if (hit && gpu_running(file->engine))
        machine.remaps_while_running++;
}

static uint32_t place(struct file *file, uint32_t op, struct range range)
{
    if (range.base % PAGE || range.length % PAGE || range.length == 0 ||
        !range_holding(file->external, range.base, range.length))
        return NV_ERR_INVALID_ADDRESS;
    if (op == ENGINE_SPARSE && (range.base % SPARSE_PAGE || range.length % SPARSE_PAGE))
        return NV_ERR_INVALID_ADDRESS;
    if (range.memory && (range.offset > range.memory->bytes || range.length > range.memory->bytes - range.offset))
        return NV_ERR_INVALID_OFFSET;
    if (range.memory)
        range.memory->refs++;
    forget(file, range.base, range.length);
    struct engine_command command = {.op = op, .base = range.base, .length = range.length, .offset = range.offset};
    uint32_t status = file->engine
                          ? engine_call(file->engine, &command, range.memory ? range.memory->fd : -1) : NV_OK;
    if (status == NV_OK && op != ENGINE_UNMAP)
        range_add(&file->mapped, range);
    else
        memory_put(range.memory);
    return status;
}

static uint32_t create_external(struct file *file, const struct uvm_range *p)
{
    if (p->base % PAGE || p->length % PAGE || p->length == 0)
        return NV_ERR_INVALID_ADDRESS;
    for (struct range *r = file->external; r; r = r->next)
        if (p->base < r->base + r->length && r->base < p->base + p->length)
            return NV_ERR_UVM_ADDRESS_IN_USE;
    range_add(&file->external, (struct range){.base = p->base, .length = p->length});
    return NV_OK;
}

static uint32_t free_external(struct file *file, uint64_t base)
{
    for (struct range **at = &file->external; *at; at = &(*at)->next)
        if ((*at)->base == base) {
            struct range *r = *at;
            uint32_t status = place(file, ENGINE_UNMAP, (struct range){.base = base, .length = r->length});
            *at = r->next;
            free(r);
            return status;
        }
    return NV_ERR_INVALID_ADDRESS;
}

static uint32_t map_external(const struct caller *caller, uint64_t argument, const struct uvm_map_head *head,
                             const struct uvm_map_tail *tail)
{
    struct client *client = client_find(tail->client);
    struct object *o = client ? object_find(client, tail->memory) : NULL;
    struct uvm_gpu_attributes attributes;
    if (tail->count == 0 || tail->count > machine.branch->uvm_max_gpus)
        return NV_ERR_INVALID_ARGUMENT;
    if (!remote_read(caller->tid, argument + sizeof *head, &attributes, sizeof attributes))
        return NV_ERR_INVALID_ADDRESS;
    uint8_t uuid[16];
    gpu_uuid(o ? o->gpu : 0, uuid);
    if (memcmp(uuid, attributes.uuid, sizeof uuid) != 0)
        return NV_ERR_INVALID_DEVICE;
    if (!o || o->kind != OBJ_MEMORY)
        return NV_ERR_OBJECT_NOT_FOUND;
    return place(caller->file, ENGINE_MAP, (struct range){
        .base = head->base, .length = head->length, .offset = head->offset, .memory = o->memory});
}

static uint32_t register_channel(const struct uvm_register_channel *p)
{
    struct client *client = client_find(p->client);
    struct object *o = client ? object_find(client, p->channel) : NULL;
    return o && o->kind == OBJ_CHANNEL ? NV_OK : NV_ERR_OBJECT_NOT_FOUND;
}

/* Where the status word of each command is, and how much of its parameters is read and written. */
static bool layout(uint32_t command, size_t *size, size_t *status)
{
#define LAYOUT(type) (*size = sizeof(type), *status = offsetof(type, status), true)
    switch (command) {
    case UVM_INITIALIZE: return LAYOUT(struct uvm_initialize);
    case UVM_MM_INITIALIZE: return LAYOUT(struct uvm_mm_initialize);
    case UVM_REGISTER_GPU: return LAYOUT(struct uvm_register_gpu);
    case UVM_REGISTER_GPU_VASPACE: return LAYOUT(struct uvm_register_vaspace);
    case UVM_REGISTER_CHANNEL: return LAYOUT(struct uvm_register_channel);
    case UVM_UNREGISTER_CHANNEL: return LAYOUT(struct uvm_unregister_channel);
    case UVM_CREATE_EXTERNAL_RANGE: return LAYOUT(struct uvm_range);
    case UVM_UNMAP_EXTERNAL:
    case UVM_MAP_EXTERNAL_SPARSE: return LAYOUT(struct uvm_gpu_range);
    case UVM_FREE: return LAYOUT(struct uvm_free);
    default: return false;
    }
}

int uvm_ioctl(const struct caller *caller, uint32_t command, uint64_t argument)
{
    struct file *file = caller->file;
    _Alignas(8) uint8_t p[64] = {0};
    size_t size, status_at;
    uint32_t status = NV_OK;

    if (command == UVM_DEINITIALIZE)
        return 0;
    if (command == UVM_MAP_EXTERNAL_ALLOCATION) {
        struct uvm_map_head head;
        struct uvm_map_tail tail;
        uint64_t tail_at = argument + sizeof head + machine.branch->uvm_max_gpus * sizeof(struct uvm_gpu_attributes);
        if (!remote_read(caller->tid, argument, &head, sizeof head) ||
            !remote_read(caller->tid, tail_at, &tail, sizeof tail))
            return -EFAULT;
        tail.status = file->initialized ? map_external(caller, argument, &head, &tail) : NV_ERR_ILLEGAL_ACTION;
        return remote_write(caller->tid, tail_at, &tail, sizeof tail) ? 0 : -EFAULT;
    }
    if (!layout(command, &size, &status_at))
        return -EINVAL;
    if (!remote_read(caller->tid, argument, p, size))
        return -EFAULT;
    struct uvm_gpu_range *r = (void *)p;
    if (!file->initialized && command != UVM_INITIALIZE && command != UVM_MM_INITIALIZE)
        status = NV_ERR_ILLEGAL_ACTION;
    else if (command == UVM_INITIALIZE)
        file->initialized = true;
    else if (command == UVM_REGISTER_CHANNEL)
        status = register_channel((void *)p);
    else if (command == UVM_CREATE_EXTERNAL_RANGE)
        status = create_external(file, (void *)p);
    else if (command == UVM_FREE)
        status = free_external(file, ((struct uvm_free *)(void *)p)->base);
    else if (command == UVM_MAP_EXTERNAL_SPARSE || command == UVM_UNMAP_EXTERNAL)
        status = place(file, command == UVM_UNMAP_EXTERNAL ? ENGINE_UNMAP : ENGINE_SPARSE,
                       (struct range){.base = r->base, .length = r->length});
    memcpy(p + status_at, &status, sizeof status);
    return remote_write(caller->tid, argument, p, size) ? 0 : -EFAULT;
}

void uvm_release(struct file *file)
{
    for (struct range *r; (r = file->mapped);) {
        file->mapped = r->next;
        memory_put(r->memory);
        free(r);
    }
    for (struct range *r; (r = file->external);) {
        file->external = r->next;
        free(r);
    }
    if (file->engine) {
        file->engine->dead = true;
        close(file->engine->command_fd); /* the engine exits when it sees this */
        file->engine->command_fd = -1;
        engine_put(file->engine);
    }
}
