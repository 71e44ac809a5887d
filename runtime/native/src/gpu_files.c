/* SPDX-License-Identifier: Apache-2.0
 *
 * Which descriptors of this process are which open driver files, and how a file gets to the
 * control loop.  Called by the process's own threads, from the hooks; no lock: a descriptor
 * belongs to whoever opens, copies or closes it.
 *
 * A file counts its descriptors, because the agent's duplicate would keep an RM client and
 * its memory alive after the process has closed its last one.
 */
#include "gpu.h"
#include "nv_abi.h"
#include "sys.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>

#define FDS_TRACKED 65536
#define NOT_OURS 0xff /* looked at: no driver file */

static struct gpu_file files[VALVE_GPU_FILES_MAX];
static _Atomic uint8_t file_of_fd[FDS_TRACKED]; /* number + 1; 0: not looked at yet */

static int kind_of_path(const char *path, size_t length)
{
    static const char ctl[] = "/dev/nvidiactl", uvm[] = "/dev/nvidia-uvm";
    if (length == sizeof ctl - 1 && __builtin_memcmp(path, ctl, length) == 0)
        return VALVE_GPU_CTL;
    if (length == sizeof uvm - 1 && __builtin_memcmp(path, uvm, length) == 0)
        return VALVE_GPU_UVM;
    return 0;
}

static int take_number(uint32_t kind)
{
    for (int i = 0; i < (int)VALVE_GPU_FILES_MAX; i++) {
        uint32_t none = 0;
        if (__atomic_load_n(&GPU_TABLE->taken, __ATOMIC_SEQ_CST) >> i & 1)
            continue; /* the agent has not let go of the file that had it: its word would count for ours */
        if (atomic_compare_exchange_strong(&files[i].kind, &none, kind)) {
            atomic_store(&files[i].sent, 0);
            atomic_store(&files[i].descriptors, 1);
            return i;
        }
    }
    return -1;
}

static int enter(int fd, int kind)
{
    int number = kind ? take_number((uint32_t)kind) : -1;
    if (fd >= 0 && fd < FDS_TRACKED)
        atomic_store(&file_of_fd[fd], (uint8_t)(kind == 0 ? NOT_OURS : number < 0 ? 0 : number + 1));
    return number;
}

void gpu_file_opened(int fd, const char *path)
{
    size_t length = 0;
    while (path[length] && length < 64)
        length++;
    int kind = kind_of_path(path, length);
    if (kind)
        enter(fd, kind);
    else if (fd < FDS_TRACKED)
        atomic_store(&file_of_fd[fd], 0);
}

/* A descriptor that came by a way without a hook (inherited, received, opened by another
 * call): its name tells. */
static int look_at(int fd)
{
    char digits[24], path[48] = "/proc/self/fd/", name[64];
    valve_copy_text(path + 14, sizeof path - 14, valve_decimal((uint64_t)fd, digits));
    long length = SYS4(SYS_readlinkat, AT_FDCWD, path, name, sizeof name);
    return enter(fd, length > 0 ? kind_of_path(name, (size_t)length) : 0);
}

int gpu_file_of(int fd)
{
    if (fd < 0)
        return -1;
    uint8_t known = fd < FDS_TRACKED ? atomic_load(&file_of_fd[fd]) : 0;
    if (known == NOT_OURS)
        return -1;
    return known ? known - 1 : look_at(fd);
}

void gpu_file_copied(int from, int to)
{
    if (to < 0 || to >= FDS_TRACKED)
        return;
    uint8_t known = from >= 0 && from < FDS_TRACKED ? atomic_load(&file_of_fd[from]) : 0;
    if (known == NOT_OURS)
        known = 0;
    if (known)
        atomic_fetch_add(&files[known - 1].descriptors, 1);
    atomic_store(&file_of_fd[to], known);
}

static int send_to_control(struct gpu_message message, int fd)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {&message, sizeof message};
    struct msghdr packet = {.msg_iov = &part, .msg_iovlen = 1};
    struct stat pipe;
    int end = atomic_load(&valve.gpu_pipe);
    if (end < 0 || SYS2(SYS_fstat, end, &pipe) != 0 || pipe.st_ino != valve.gpu_pipe_inode)
        return -1; /* the process closed it, and may have given its number to another file */
    if (fd >= 0) {
        control.header.cmsg_len = CMSG_LEN(sizeof(int));
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        __builtin_memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
        packet.msg_control = &control;
        packet.msg_controllen = CMSG_SPACE(sizeof(int));
    }
    long sent;
    do
        sent = SYS3(SYS_sendmsg, end, &packet, MSG_NOSIGNAL);
    while (sent == -EINTR);
    return sent < 0 ? -1 : 0;
}

static void file_gone(int number)
{
    gpu_objects_of_file_gone(number);
    if (atomic_exchange(&files[number].sent, 0))
        /* If this fails the control loop is gone as well, and its duplicate with it. */
        (void)send_to_control((struct gpu_message){1, (uint32_t)number, atomic_load(&files[number].kind)}, -1);
    atomic_store(&files[number].kind, 0);
}

void gpu_file_closing(int fd)
{
    if (fd < 0 || fd >= FDS_TRACKED)
        return;
    uint8_t known = atomic_exchange(&file_of_fd[fd], 0);
    if (known != 0 && known != NOT_OURS && atomic_fetch_sub(&files[known - 1].descriptors, 1) == 1)
        file_gone(known - 1);
}

void gpu_files_closing(unsigned first, unsigned last)
{
    for (unsigned fd = first; fd <= last && fd < FDS_TRACKED; fd++)
        if (atomic_load(&file_of_fd[fd]))
            gpu_file_closing((int)fd);
}

int gpu_file_hand_over(int fd, int number)
{
    struct gpu_file *file = &files[number];
    uint32_t not_sent = 0;
    if (!atomic_compare_exchange_strong(&file->sent, &not_sent, 1))
        return 0;
    if (send_to_control((struct gpu_message){0, (uint32_t)number, atomic_load(&file->kind)}, fd) == 0)
        return 0;
    atomic_store(&file->sent, 0);
    VALVE_SET_ERROR("the driver's file cannot be handed to Valve's control loop: this process has closed "
                    "descriptors that were not its own (close only what you opened)");
    return -1;
}

/* The child has the parent's descriptors, but a control loop of its own. */
void gpu_files_forked(void)
{
    for (unsigned i = 0; i < VALVE_GPU_FILES_MAX; i++)
        atomic_store(&files[i].sent, 0);
}
