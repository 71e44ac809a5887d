/* SPDX-License-Identifier: Apache-2.0
 *
 * The seccomp filter. A filter cannot read paths or descriptors, so it sends every open, every call
 * of the stat family and every ioctl that may be ours to the supervisor, which lets the others
 * continue: ioctls of type 'F', and UVM's, which are plain small numbers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fake.h"

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1u << 5)
#endif

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#else
#error "fakenv knows x86-64 and aarch64"
#endif

const char *filter_unavailable(void)
{
    struct seccomp_notif_sizes sizes;
    return syscall(SYS_seccomp, SECCOMP_GET_NOTIF_SIZES, 0, &sizes) < 0
               ? "this kernel has no seccomp user notification (Linux 5.0 or newer is needed)" : NULL;
}

int filter_install(void)
{
    static const int trapped[] = {
        SYS_openat, SYS_openat2, SYS_fstat, SYS_newfstatat, SYS_statx, SYS_faccessat, SYS_faccessat2, SYS_readlinkat,
#ifdef SYS_open
        SYS_open, SYS_stat, SYS_lstat, SYS_access, SYS_readlink,
#endif
    };
    enum { TRAPPED = sizeof trapped / sizeof trapped[0], HEAD = 3 + TRAPPED };
    struct sock_filter code[HEAD + 9] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 0, TRAPPED + 7),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    };
    const struct sock_filter tail[] = {
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 6),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 256, 0, 5),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, UVM_INITIALIZE, 4, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, UVM_DEINITIALIZE, 3, 0),
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xff00),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0x4600, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
    };
    for (unsigned i = 0; i < TRAPPED; i++)
        code[3 + i] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)trapped[i],
                                                   (uint8_t)(TRAPPED - i - 1 + 8), 0);
    memcpy(code + HEAD, tail, sizeof tail);
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    /* The second flag is from Linux 5.19; without it a signal may interrupt a call half-way. */
    unsigned flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    int fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    if (fd < 0 && errno == EINVAL) {
        flags = SECCOMP_FILTER_FLAG_NEW_LISTENER;
        fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    }
    if (fd < 0 && errno == EACCES) { /* not an administrator: allowed only without new privileges */
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
    }
    if (fd < 0) {
        fprintf(stderr, "fakenv: cannot install the seccomp filter: %s%s\n", strerror(errno),
                errno == EBUSY ? " (a filter with a listener is already there: fakenv cannot be nested)" : "");
        exit(125);
    }
    return fd;
}
