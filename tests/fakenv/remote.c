/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

/* One field of /proc/TID/status; the process is inside a system call, so it cannot go away. */
static uint64_t status_field(pid_t tid, const char *name, int base)
{
    char path[64], text[4096];
    snprintf(path, sizeof path, "/proc/%d/status", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    const char *at = strstr(text, name);
    return at ? strtoull(at + strlen(name), NULL, base) : 0;
}

pid_t remote_tgid(pid_t tid)
{
    return (pid_t)status_field(tid, "\nTgid:", 10);
}

bool remote_capable(pid_t tid, unsigned capability)
{
    return status_field(tid, "\nCapEff:", 16) >> capability & 1;
}
