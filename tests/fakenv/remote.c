/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fake.h"

bool remote_read(pid_t tid, uint64_t address, void *to, size_t bytes)
{
    struct iovec here = {to, bytes}, there = {(void *)(uintptr_t)address, bytes};
    return process_vm_readv(tid, &here, 1, &there, 1, 0) == (ssize_t)bytes;
}

bool remote_write(pid_t tid, uint64_t address, const void *from, size_t bytes)
{
    struct iovec here = {(void *)(uintptr_t)from, bytes}, there = {(void *)(uintptr_t)address, bytes};
    return process_vm_writev(tid, &here, 1, &there, 1, 0) == (ssize_t)bytes;
}

/* Copies a path, at most bytes - 1 of it; it may end at the end of a mapped page. */
size_t remote_path(pid_t tid, uint64_t address, char *to, size_t bytes)
{
    size_t got = 0;
    while (got < bytes - 1) {
        size_t want = 4096 - (address + got) % 4096;
        if (want > bytes - 1 - got)
            want = bytes - 1 - got;
        if (!remote_read(tid, address + got, to + got, want))
            break;
        if (memchr(to + got, 0, want))
            return strlen(to);
        got += want;
    }
    to[got] = 0;
    return got;
}

enum { STATUS = 4096 };

/* /proc/TID/status; empty when there is no such process. */
static void status_text(pid_t tid, char text[STATUS])
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/status", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, STATUS - 1);
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = 0;
}

/* One field of it; a caller is inside a system call, so it cannot go away. */
static uint64_t status_field(pid_t tid, const char *name, int base)
{
    char text[STATUS];
    status_text(tid, text);
    const char *at = strstr(text, name);
    return at ? strtoull(at + strlen(name), NULL, base) : 0;
}

pid_t remote_tgid(pid_t tid)
{
    return (pid_t)status_field(tid, "\nTgid:", 10);
}

/* A process's ids in its PID namespaces, the supervisor's first; how many there are, 0 when it is gone. */
static unsigned namespaces(pid_t pid, pid_t names[], unsigned count)
{
    char text[STATUS], *at, *end;
    unsigned found = 0;
    status_text(pid, text);
    at = strstr(text, "\nNSpid:");
    for (at = at ? at + 7 : NULL; at && found < count; at = end) {
        while (*at == '\t' || *at == ' ')
            at++;
        names[found] = (pid_t)strtol(at, &end, 10);
        if (end == at)
            break;
        found++;
    }
    return found;
}

pid_t remote_name(pid_t tid, pid_t pid)
{
    enum { DEPTH = 32 }; /* the kernel's own limit */
    pid_t caller[DEPTH + 1], other[DEPTH + 1];
    unsigned depth = namespaces(tid, caller, DEPTH + 1), deep = namespaces(pid, other, DEPTH + 1);
    char path[64];
    struct stat from, to;
    if (!depth || deep < depth)
        return 0;
    if (depth == 1)
        return pid; /* the supervisor's own namespace */
    if (deep == depth) { /* two namespaces may be equally deep */
        snprintf(path, sizeof path, "/proc/%d/ns/pid", tid);
        bool known = stat(path, &from) == 0;
        snprintf(path, sizeof path, "/proc/%d/ns/pid", pid);
        if (known && stat(path, &to) == 0 && from.st_ino != to.st_ino)
            return 0;
    }
    return other[depth - 1];
}

bool remote_capable(pid_t tid, unsigned capability)
{
    return status_field(tid, "\nCapEff:", 16) >> capability & 1;
}
