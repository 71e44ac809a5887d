/* SPDX-License-Identifier: Apache-2.0
 *
 * The syscall boundary: receives notifications, answers what is ours, lets everything else go on.
 *
 * One thread per listener. It answers by itself as long as that cannot take long; a request that
 * finds rm_lock taken, or that a rule will delay, goes to a thread of its own, so that opens of
 * unrelated files never wait for a slow driver call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fake.h"

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS _IOW('!', 4, uint64_t)
#endif
#ifdef SYS_open
#define OLD_OPEN SYS_open
#else
#define OLD_OPEN SYS_openat
#endif
enum { SYNC_WAKE_UP = 1, MAX_ESCAPE = 4096 };

struct request { int listener; struct seccomp_notif notif; };

static void answer(int listener, uint64_t id, int64_t value)
{
    struct seccomp_notif_resp r = {.id = id, .val = value < 0 ? 0 : value, .error = value < 0 ? (int)value : 0};
    ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &r);
}

static void go_on(int listener, uint64_t id)
{
    struct seccomp_notif_resp r = {.id = id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
    ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &r);
}

int notify_give(const struct caller *caller, int fd, bool cloexec)
{
    struct seccomp_notif_addfd add = {.id = caller->id, .srcfd = (uint32_t)fd, .newfd_flags = cloexec ? O_CLOEXEC : 0};
    int there = ioctl(caller->listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
    return there < 0 ? -errno : there;
}

/* ---- opens ---- */

static int text_file(const char *text)
{
    int fd = memfd_create("fakenv-proc", MFD_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        return -ENFILE;
    lseek(fd, 0, SEEK_SET);
    return fd;
}

/* A descriptor to hand over, -errno to answer, or -EAGAIN when the path is not ours. */
static int open_ours(const char *path, pid_t tid)
{
    char text[512];
    char *end;
    if (strncmp(path, "/dev/nvidia", 11) == 0) {
        const char *rest = path + 11;
        if (!nodes_there(tid, path))
            return -ENOENT;
        if (strcmp(rest, "ctl") == 0)
            return files_open(FILE_CTL, 255, tid);
        if (strcmp(rest, "-uvm") == 0)
            return files_open(FILE_UVM, 0, tid);
        unsigned long minor = strtoul(rest, &end, 10);
        return *rest && !*end ? files_open(FILE_GPU, (unsigned)minor, tid) : -ENOENT;
    }
    if (strncmp(path, "/proc/driver/nvidia/", 20) == 0) {
        if (!machine.driver)
            return -ENOENT;
        if (strcmp(path + 20, "version") == 0) {
            snprintf(text, sizeof text,
                     "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  %s  Release Build  (fakenv)\n"
                     "GCC version:  none, this is the fake driver\n", machine.version);
            return text_file(text);
        }
        if (strcmp(path + 20, "params") == 0)
            return text_file("RegistryDwords: \"\"\nRegistryDwordsPerDevice: \"\"\n");
        return -ENOENT;
    }
    return -EAGAIN;
}

static void handle_open(int listener, const struct seccomp_notif *n)
{
    char path[256];
    int nr = n->data.nr;
    bool at = nr == SYS_openat || nr == SYS_openat2; /* the others have no descriptor in front */
    uint64_t flags = n->data.args[at ? 2 : 1];
    remote_path((pid_t)n->pid, n->data.args[at ? 1 : 0], path, sizeof path);
    int fd = open_ours(path, (pid_t)n->pid);
    if (fd == -EAGAIN) {
        go_on(listener, n->id);
        return;
    }
    if (fd < 0) {
        answer(listener, n->id, fd);
        return;
    }
    if (nr == SYS_openat2) {
        uint64_t how = 0;
        remote_read((pid_t)n->pid, n->data.args[2], &how, sizeof how);
        flags = how;
    }
    struct seccomp_notif_addfd add = {.id = n->id, .flags = SECCOMP_ADDFD_FLAG_SEND, .srcfd = (uint32_t)fd,
                                      .newfd_flags = flags & O_CLOEXEC ? O_CLOEXEC : 0};
    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add) < 0)
        answer(listener, n->id, -errno);
    close(fd);
}

/* ---- ioctls ---- */

static int attach(const struct caller *caller, struct fakenv_attach *p)
{
    int pair[2];
    struct timeval limit = {.tv_sec = 2};
    struct engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        abort();
    p->status = NV_ERR_INVALID_STATE;
    if (caller->file->kind != FILE_UVM || caller->file->engine || !caller->file->initialized) {
        free(engine);
        return 0;
    }
    engine->refs = 1;
    engine->shared_fd = memfd_create("fakenv-gpu", MFD_CLOEXEC);
    if (engine->shared_fd < 0 || ftruncate(engine->shared_fd, sizeof *engine->shared) < 0 ||
        socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        abort();
    engine->shared = mmap(NULL, sizeof *engine->shared, PROT_READ | PROT_WRITE, MAP_SHARED, engine->shared_fd, 0);
    if (engine->shared == MAP_FAILED)
        abort();
    atomic_store(&engine->shared->unmap_syncs, machine.unmap_syncs);
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    engine->command_fd = pair[0];
    p->shared_fd = notify_give(caller, engine->shared_fd, true);
    p->command_fd = notify_give(caller, pair[1], true);
    close(pair[1]);
    caller->file->engine = engine;
    p->status = NV_OK;
    return 0;
}

static void query(const struct caller *caller, struct fakenv_query *q)
{
    unsigned gpu = q->gpu;
    memset(q, 0, sizeof *q);
    q->gpu = gpu;
    q->gpus = machine.gpus;
    snprintf(q->version, sizeof q->version, "%s", machine.version);
    snprintf(q->name, sizeof q->name, "NVIDIA Fake GPU");
    snprintf(q->branch, sizeof q->branch, "%s", machine.branch->name);
    sched_collect_faults();
    q->status = gpu < machine.gpus ? NV_OK : NV_ERR_INVALID_DEVICE;
    if (q->status)
        return;
    gpu_uuid(gpu, q->uuid);
    q->lost = machine.lost[gpu];
    q->compute_channels = machine.compute_channels;
    q->total_bytes = machine.gpu_bytes;
    q->used_bytes = machine.used_bytes[gpu];
    q->xid = machine.last_xid[gpu];
    q->xid_count = machine.xid_count[gpu];
    for (struct channel *c = machine.channels; c; c = c->next_all)
        if (c->gpu == gpu && c->engine && c->engine->shared->slot[c->token].state == ST_RUNNING)
            q->running++;
    for (struct client *c = machine.clients; c; c = c->next)
        for (struct object *o = c->objects; o; o = o->next) {
            if (o->gpu != gpu || (o->kind != OBJ_TSG && o->kind != OBJ_MEMORY))
                continue;
            pid_t pid = o->kind == OBJ_MEMORY ? o->memory->pid : c->pid;
            unsigned i = 0;
            while (i < q->process_count && q->process[i].pid != (uint32_t)pid)
                i++;
            if (i == FAKENV_MAX_PROCESSES || (o->kind == OBJ_MEMORY && pid != c->pid))
                continue; /* a duplicate is on the bill of who allocated it */
            q->process_count = i + 1 > q->process_count ? i + 1 : q->process_count;
            q->process[i].pid = (uint32_t)pid;
            q->process[i].used_bytes += o->kind == OBJ_MEMORY ? o->memory->bytes : 0;
        }
    unsigned seen = 0;
    for (unsigned i = 0; i < q->process_count; i++) {
        pid_t name = remote_name(caller->tid, (pid_t)q->process[i].pid);
        if (name) {
            q->process[seen] = q->process[i];
            q->process[seen++].pid = (uint32_t)name;
        }
    }
    q->process_count = seen;
}

static void memory_size(struct fakenv_size *p)
{
    struct client *client = client_find(p->client);
    struct object *o = client ? object_find(client, p->object) : NULL;
    p->bytes = o && o->kind == OBJ_MEMORY ? o->memory->bytes : 0;
    p->gpu = o ? o->gpu : 0;
}

static int check_version(struct nv_version *v)
{
    v->reply = 1;
    bool match = v->cmd == '1' ? strncmp(v->version, machine.version, 4) == 0
                               : strncmp(v->version, machine.version, sizeof v->version) == 0;
    if (v->cmd == '2' || !match)
        snprintf(v->version, sizeof v->version, "%s", machine.version);
    return v->cmd == '2' || match ? 0 : -EINVAL;
}

static void card_info(struct nv_card *card, size_t count)
{
    memset(card, 0, count * sizeof *card);
    for (unsigned i = 0; i < machine.gpus && i < count; i++) {
        card[i] = (struct nv_card){.valid = 1, .gpu_id = gpu_id(i), .fb_size = machine.gpu_bytes, .minor = i};
        card[i].pci = (struct nv_pci){.bus = (uint8_t)(i + 1), .vendor = 0x10de, .device = 0x2330};
    }
}

static int register_fd(const struct caller *caller, int32_t fd)
{
    struct file *ctl = files_find(caller->tid, fd);
    if (caller->file->kind != FILE_GPU || !ctl || ctl->kind != FILE_CTL || caller->file->ctl)
        return -EINVAL;
    caller->file->ctl = ctl;
    return 0;
}

static size_t escape_size(uint32_t nr, size_t size)
{
    switch (nr) {
    case NV_ESC_RM_FREE: return sizeof(struct nvos00);
    case NV_ESC_RM_CONTROL: return sizeof(struct nvos54);
    case NV_ESC_RM_ALLOC: return size == sizeof(struct nvos21) ? size : sizeof(struct nvos64);
    case NV_ESC_RM_DUP_OBJECT: return sizeof(struct nvos55);
    case NV_ESC_RM_SHARE: return sizeof(struct nvos57);
    case NV_ESC_REGISTER_FD: return sizeof(int32_t);
    case NV_ESC_CHECK_VERSION_STR: return sizeof(struct nv_version);
    case NV_ESC_WAIT_OPEN_COMPLETE: return 8;
    case NV_ESC_SYS_PARAMS: return 8;
    case FAKENV_ESC_ATTACH: return sizeof(struct fakenv_attach);
    case FAKENV_ESC_QUERY: return sizeof(struct fakenv_query);
    case FAKENV_ESC_SIZE: return sizeof(struct fakenv_size);
    case NV_ESC_CARD_INFO:
    case NV_ESC_ATTACH_GPUS_TO_FD: return size;
    default: return SIZE_MAX;
    }
}

static int escape(const struct caller *caller, uint32_t nr, size_t size, uint64_t at)
{
    static _Alignas(8) uint8_t p[MAX_ESCAPE]; /* rm_lock is held */
    struct nv_xfer xfer;
    int result = 0;
    if (nr == NV_ESC_IOCTL_XFER_CMD) {
        if (size != sizeof xfer)
            return -EINVAL;
        if (!remote_read(caller->tid, at, &xfer, sizeof xfer))
            return -EFAULT;
        nr = xfer.cmd, size = xfer.size, at = xfer.ptr;
    }
    if (size != escape_size(nr, size) || size > sizeof p)
        return -EINVAL;
    if (!remote_read(caller->tid, at, p, size))
        return -EFAULT;
    bool device_only = nr == NV_ESC_REGISTER_FD;
    bool any_file = device_only || nr == NV_ESC_WAIT_OPEN_COMPLETE || nr == FAKENV_ESC_ATTACH || nr == FAKENV_ESC_QUERY;
    if (!any_file && caller->file->kind != FILE_CTL)
        return -EINVAL;
    machine.calls++;
    switch (nr) {
    case NV_ESC_RM_FREE: rm_free(caller, (void *)p); break;
    case NV_ESC_RM_CONTROL: rm_control(caller, (void *)p); break;
    case NV_ESC_RM_DUP_OBJECT: rm_dup(caller, (void *)p); break;
    case NV_ESC_RM_SHARE: rm_share(caller, (void *)p); break;
    case NV_ESC_REGISTER_FD: memcpy(&result, p, 4), result = register_fd(caller, result); break;
    case NV_ESC_CHECK_VERSION_STR: result = check_version((void *)p); break;
    case NV_ESC_CARD_INFO: card_info((void *)p, size / sizeof(struct nv_card)); break;
    case NV_ESC_WAIT_OPEN_COMPLETE: memset(p, 0, size); break;
    case FAKENV_ESC_ATTACH: result = attach(caller, (void *)p); break;
    case FAKENV_ESC_QUERY: query(caller, (void *)p); break;
    case FAKENV_ESC_SIZE: memory_size((void *)p); break;
    case NV_ESC_RM_ALLOC:
        if (size == sizeof(struct nvos64)) {
            rm_alloc(caller, (void *)p);
        } else {
            struct nvos21 *small = (void *)p;
            struct nvos64 wide = {small->root, small->parent, small->object, small->hclass,
                                  small->params, 0, small->params_size, 0, 0, 0};
            rm_alloc(caller, &wide);
            small->object = wide.object, small->hclass = wide.hclass, small->status = wide.status;
        }
        break;
    }
    return remote_write(caller->tid, at, p, size) ? result : -EFAULT;
}

static void handle_ioctl(int listener, const struct seccomp_notif *n)
{
    uint32_t command = (uint32_t)n->data.args[1];
    struct caller caller = {.tid = (pid_t)n->pid, .listener = listener, .id = n->id};
    caller.file = files_find(caller.tid, (int)n->data.args[0]);
    if (!caller.file)
        go_on(listener, n->id);
    else if (caller.file->kind == FILE_UVM && _IOC_TYPE(command) != 'F')
        answer(listener, n->id, uvm_ioctl(&caller, command, n->data.args[2]));
    else
        answer(listener, n->id, escape(&caller, _IOC_NR(command), _IOC_SIZE(command), n->data.args[2]));
}

static void *patient(void *argument)
{
    struct request *request = argument;
    pthread_mutex_lock(&rm_lock);
    handle_ioctl(request->listener, &request->notif);
    pthread_mutex_unlock(&rm_lock);
    close(request->listener);
    free(request);
    return NULL;
}

static void hand_over(int listener, const struct seccomp_notif *n)
{
    pthread_t thread;
    struct request *request = malloc(sizeof *request);
    if (!request)
        abort();
    *request = (struct request){fcntl(listener, F_DUPFD_CLOEXEC, 0), *n};
    if (pthread_create(&thread, NULL, patient, request))
        abort();
    pthread_detach(thread);
}

static void *serve(void *argument)
{
    int listener = (int)(intptr_t)argument;
    ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SYNC_WAKE_UP); /* faster where known; else ignored */
    for (;;) {
        struct pollfd ready = {.fd = listener, .events = POLLIN};
        struct seccomp_notif n = {0};
        if (poll(&ready, 1, -1) < 0)
            continue;
        if (!(ready.revents & POLLIN))
            break; /* the last process under this filter has gone */
        if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &n) < 0)
            continue;
        int64_t node = NODE_NOT_OURS;
        if (n.data.nr == SYS_openat || n.data.nr == SYS_openat2 || n.data.nr == OLD_OPEN) {
            handle_open(listener, &n);
        } else if (n.data.nr != SYS_ioctl) {
            node = nodes_answer((pid_t)n.pid, n.data.nr, (const uint64_t *)n.data.args);
            if (node == NODE_NOT_OURS)
                go_on(listener, n.id);
            else
                answer(listener, n.id, node);
        } else if (knobs_slow() || pthread_mutex_trylock(&rm_lock) != 0) {
            hand_over(listener, &n);
        } else {
            handle_ioctl(listener, &n);
            pthread_mutex_unlock(&rm_lock);
        }
    }
    close(listener);
    return NULL;
}

void notify_serve(int listener)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)listener))
        abort();
    pthread_detach(thread);
}
