/* SPDX-License-Identifier: Apache-2.0
 *
 * How the device files look to who does not open them: stat and fstat say a character device with
 * NVIDIA's numbers, access says yes, and a link in /proc/PID/fd has the right name. The descriptor
 * underneath is a socket; what is not asked here (listing /dev, mmap, poll) still shows that.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "fake.h"

/* On 64-bit machines the C library's struct stat is the kernel's. */
_Static_assert(sizeof(void *) == 8, "struct stat");

enum { NVIDIA_MAJOR = 195, UVM_MAJOR = 511 };
enum { PATH_SEEN = 64 };

static bool node_of_path(const char *path, enum file_kind *kind, unsigned *minor)
{
    char *end;
    if (!machine.driver || strncmp(path, "/dev/nvidia", 11) != 0)
        return false;
    const char *rest = path + 11;
    *minor = 0;
    if (strcmp(rest, "-uvm") == 0) {
        *kind = FILE_UVM;
        return true;
    }
    if (strcmp(rest, "ctl") == 0) {
        *kind = FILE_CTL;
        *minor = 255;
        return true;
    }
    *kind = FILE_GPU;
    *minor = (unsigned)strtoul(rest, &end, 10);
    return *rest && !*end && *minor < machine.gpus;
}

bool nodes_there(pid_t tid, const char *path)
{
    char there[128];
    struct stat st;
    if (!machine.need_nodes)
        return true;
    snprintf(there, sizeof there, "/proc/%d/root%s", tid, path);
    return stat(there, &st) == 0 && S_ISCHR(st.st_mode) && (major(st.st_rdev) == NVIDIA_MAJOR || major(st.st_rdev) == UVM_MAJOR);
}

static void fill(enum file_kind kind, unsigned minor, struct stat *st)
{
    /* One inode per node, however often it is open: identity is in the open file, not here. */
    *st = (struct stat){.st_ino = 1000 + minor + (kind == FILE_UVM ? 500 : 0), .st_mode = 0020666, .st_nlink = 1,
                        .st_dev = makedev(0, 6), .st_blksize = 4096,
                        .st_rdev = makedev(kind == FILE_UVM ? UVM_MAJOR : NVIDIA_MAJOR, minor)};
}

static int64_t give_stat(pid_t tid, uint64_t at, const struct stat *st)
{
    return remote_write(tid, at, st, sizeof *st) ? 0 : -EFAULT;
}

static int64_t give_statx(pid_t tid, uint64_t at, const struct stat *st)
{
    struct statx x = {.stx_mask = STATX_BASIC_STATS, .stx_blksize = 4096, .stx_nlink = 1, .stx_mode = (uint16_t)st->st_mode,
                      .stx_ino = st->st_ino, .stx_rdev_major = major(st->st_rdev), .stx_rdev_minor = minor(st->st_rdev),
                      .stx_dev_major = major(st->st_dev), .stx_dev_minor = minor(st->st_dev)};
    return remote_write(tid, at, &x, sizeof x) ? 0 : -EFAULT;
}

/* readlink of /proc/PID/fd/N: the name the node would have there. */
static int64_t readlink_ours(pid_t tid, const char *path, uint64_t at, uint64_t bytes)
{
    char name[48];
    const char *fd = strstr(path, "/fd/");
    enum file_kind kind;
    unsigned minor;
    if (strncmp(path, "/proc/", 6) != 0 || !fd)
        return NODE_NOT_OURS;
    bool own = strncmp(path, "/proc/self/", 11) == 0 || strncmp(path, "/proc/thread-self/", 18) == 0;
    char there[128]; /* in the caller's /proc, where processes have the names that it knows */
    snprintf(there, sizeof there, "/proc/%d/root%s", tid, path);
    if (!(own ? files_look(tid, atoi(fd + 4), &kind, &minor) : files_look_at(there, &kind, &minor)))
        return NODE_NOT_OURS;
    snprintf(name, sizeof name, kind == FILE_CTL ? "/dev/nvidiactl" : kind == FILE_UVM ? "/dev/nvidia-uvm" : "/dev/nvidia%u", minor);
    uint64_t n = strlen(name) < bytes ? strlen(name) : bytes;
    return remote_write(tid, at, name, n) ? (int64_t)n : -EFAULT;
}

int64_t nodes_answer(pid_t tid, int nr, const uint64_t arg[6])
{
    /* Which argument of each call is its path, its descriptor, its buffer; -1: it has none. */
    static const struct { int nr; int8_t path, fd, buffer; } calls[] = {
        {SYS_fstat, -1, 0, 1}, {SYS_newfstatat, 1, 0, 2}, {SYS_statx, 1, 0, 4},
        {SYS_faccessat, 1, -1, -1}, {SYS_faccessat2, 1, -1, -1}, {SYS_readlinkat, 1, -1, 2},
#ifdef SYS_stat
        {SYS_stat, 0, -1, 1}, {SYS_lstat, 0, -1, 1}, {SYS_access, 0, -1, -1}, {SYS_readlink, 0, -1, 1},
#endif
    };
    unsigned i = 0, minor;
    enum file_kind kind;
    char path[PATH_SEEN] = "";
    struct stat st;
    while (i < sizeof calls / sizeof *calls && calls[i].nr != nr)
        i++;
    if (i == sizeof calls / sizeof *calls)
        return NODE_NOT_OURS;
    if (calls[i].path >= 0)
        remote_path(tid, arg[calls[i].path], path, sizeof path);
    bool is_link = nr == SYS_readlinkat;
#ifdef SYS_readlink
    is_link |= nr == SYS_readlink;
#endif
    if (is_link)
        return readlink_ours(tid, path, arg[calls[i].buffer], arg[calls[i].buffer + 1]);
    if (calls[i].path >= 0 && path[0]) {
        if (!node_of_path(path, &kind, &minor) || !nodes_there(tid, path))
            return NODE_NOT_OURS;
    } else if (calls[i].fd < 0 || !files_look(tid, (int)arg[calls[i].fd], &kind, &minor)) {
        return NODE_NOT_OURS;
    }
    if (calls[i].buffer < 0)
        return 0; /* access: 0666 */
    fill(kind, minor, &st);
    return nr == SYS_statx ? give_statx(tid, arg[4], &st) : give_stat(tid, arg[calls[i].buffer], &st);
}
