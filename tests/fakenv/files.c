/* SPDX-License-Identifier: Apache-2.0
 *
 * Open files. A descriptor that we hand out is one end of a socket pair: its inode names the open
 * (whoever holds the descriptor, by whatever way it came), and our end hangs up exactly when the
 * last copy anywhere is closed, which is when a driver's release() would run.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fake.h"

struct machine machine;
pthread_mutex_t rm_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_mutex_t files_lock = PTHREAD_MUTEX_INITIALIZER;
static int watch = -1;

uint32_t gpu_id(unsigned gpu)
{
    return (gpu + 1) << 8; /* bus number << 8, as the driver numbers PCI devices */
}

void gpu_uuid(unsigned gpu, uint8_t uuid[16])
{
    memcpy(uuid, "fakenv-gpu-uuid", 15);
    uuid[15] = (uint8_t)gpu;
}

int files_open(enum file_kind kind, unsigned minor, pid_t tid)
{
    if (!machine.driver || (kind == FILE_GPU && minor >= machine.gpus))
        return -ENOENT;
    if (kind == FILE_GPU && machine.lost[minor])
        return -EIO;
    int pair[2];
    struct stat st;
    struct file *file = calloc(1, sizeof *file);
    if (!file || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
        free(file);
        return -ENFILE;
    }
    fstat(pair[1], &st);
    file->inode = st.st_ino;
    file->device = st.st_dev;
    file->watch_fd = pair[0];
    file->kind = kind;
    file->minor = minor;
    file->pid = remote_tgid(tid);
    pthread_mutex_lock(&files_lock);
    file->next = machine.files;
    machine.files = file;
    pthread_mutex_unlock(&files_lock);
    struct epoll_event event = {.events = 0, .data.ptr = file};
    epoll_ctl(watch, EPOLL_CTL_ADD, pair[0], &event);
    return pair[1];
}

/* files_lock held */
static struct file *find_at(const char *path)
{
    struct stat st;
    if (stat(path, &st) < 0 || !S_ISSOCK(st.st_mode))
        return NULL;
    for (struct file *f = machine.files; f; f = f->next)
        if (f->inode == st.st_ino && f->device == st.st_dev)
            return f;
    return NULL;
}

/* files_lock held */
static struct file *find(pid_t tid, int fd)
{
    char path[48];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", tid, fd);
    return find_at(path);
}

struct file *files_find(pid_t tid, int fd)
{
    pthread_mutex_lock(&files_lock);
    struct file *file = find(tid, fd);
    pthread_mutex_unlock(&files_lock);
    return file; /* it stays: only a holder of rm_lock takes files away */
}

bool files_look_at(const char *path, enum file_kind *kind, unsigned *minor)
{
    pthread_mutex_lock(&files_lock);
    struct file *file = find_at(path);
    if (file)
        *kind = file->kind, *minor = file->minor;
    pthread_mutex_unlock(&files_lock);
    return file != NULL;
}

bool files_look(pid_t tid, int fd, enum file_kind *kind, unsigned *minor)
{
    char path[48];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", tid, fd);
    return files_look_at(path, kind, minor);
}

void memory_put(struct memory *memory)
{
    if (!memory || --memory->refs)
        return;
    machine.used_bytes[memory->gpu] -= memory->bytes;
    close(memory->fd);
    free(memory);
}

void engine_put(struct engine *engine)
{
    if (!engine || --engine->refs)
        return;
    munmap(engine->shared, sizeof *engine->shared);
    close(engine->shared_fd);
    free(engine);
}

static void release(struct file *file)
{
    pthread_mutex_lock(&files_lock);
    for (struct file **at = &machine.files; *at; at = &(*at)->next)
        if (*at == file) {
            *at = file->next;
            break;
        }
    for (struct file *f = machine.files; f; f = f->next)
        if (f->ctl == file)
            f->ctl = NULL;
    pthread_mutex_unlock(&files_lock);
    for (struct client *c = machine.clients, *next; c; c = next) {
        next = c->next;
        if (c->owner == file)
            client_free(c);
    }
    uvm_release(file);
    memory_put(file->exported);
    close(file->watch_fd);
    free(file);
}

static void *watch_loop(void *unused)
{
    for (;;) {
        struct epoll_event event;
        if (epoll_wait(watch, &event, 1, -1) != 1)
            continue;
        pthread_mutex_lock(&rm_lock);
        release(event.data.ptr);
        pthread_mutex_unlock(&rm_lock);
    }
    return unused;
}

void files_start_watch(void)
{
    pthread_t thread;
    watch = epoll_create1(EPOLL_CLOEXEC);
    if (watch < 0 || pthread_create(&thread, NULL, watch_loop, NULL))
        abort();
    pthread_detach(thread);
}
