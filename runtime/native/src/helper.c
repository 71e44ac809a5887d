/* SPDX-License-Identifier: Apache-2.0
 *
 * The address-space helper: a process made by clone(CLONE_VM).  It shares memory and
 * nothing else with the process it serves: job control does not stop it along with
 * the process, and closing all descriptors there does not cut it off.  It inherits
 * the thread pointer of the thread that made it, hence sys.h and no libc.
 */
#include "control.h"
#include "state.h"
#include "sys.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <linux/kcmp.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

/* kcmp says whether the process still has our memory; where a sandbox forbids kcmp, the
 * auxiliary vector tells programs apart, because it holds random addresses. */
static int kcmp_works;
static int leaderless; /* the first thread has ended, the process has not */
static uint64_t image_at_start;

static long compare_memory(void)
{
    return SYS5(SYS_kcmp, sys_getpid(), valve.main_pid, KCMP_VM, 0, 0);
}

/* Bytes of /proc/PID/auxv of the process served: 0 or -ESRCH (it depends on the kernel) once
 * its first thread has let go of its memory, another -errno if we may not look. */
static long read_auxv(char *bytes, size_t size)
{
    char number[24], path[48] = "/proc/";
    size_t n = 6;
    for (const char *c = valve_decimal((uint64_t)valve.main_pid, number); *c; c++)
        path[n++] = *c;
    valve_copy_text(path + n, sizeof path - n, "/auxv");
    int fd = (int)SYS4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return fd;
    long got = SYS3(SYS_read, fd, bytes, size);
    sys_close(fd);
    return got;
}

/* A hash of the auxiliary vector; 0 if there is none to see. */
static uint64_t image(void)
{
    char bytes[512];
    long got = read_auxv(bytes, sizeof bytes);
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (long i = 0; i < got; i++)
        hash = (hash ^ (unsigned char)bytes[i]) * 1099511628211u;
    return got > 0 ? hash : 0;
}

int helper_enter(void)
{
    SYS2(SYS_prctl, PR_SET_NAME, "valve-helper");
    SYS0(SYS_setsid);
    sys_close(0);
    sys_close(1);
    int kept = valve.gpu_control_end;
    if (kept > 3)
        SYS3(SYS_close_range, 3, kept - 1, 0);
    SYS3(SYS_close_range, kept >= 3 ? kept + 1 : 3, ~0u, 0);
    /* No connection may become the stderr that sentences are written to. */
    int filler;
    do
        filler = (int)SYS4(SYS_openat, AT_FDCWD, "/dev/null", O_RDWR, 0);
    while (filler >= 0 && filler <= 2);
    if (filler > 2)
        sys_close(filler);
    leaderless = 0;
    kcmp_works = compare_memory() == 0;
    image_at_start = kcmp_works ? 0 : image();
    return (int)SYS2(SYS_pidfd_open, valve.main_pid, 0);
}

int helper_signals(void)
{
    uint64_t mask = 1ull << (SIGURG - 1);
    return (int)SYS4(SYS_signalfd4, -1, &mask, sizeof mask, SFD_CLOEXEC | SFD_NONBLOCK);
}

void helper_drain_signals(int fd)
{
    struct signalfd_siginfo infos[4];
    while (SYS3(SYS_read, fd, infos, sizeof infos) > 0)
        ;
}

static int has_ended(int pidfd, uint64_t wait_ns)
{
    struct pollfd end = {pidfd, POLLIN, 0};
    return sys_getppid() != valve.main_pid || sys_poll(&end, 1, wait_ns) > 0;
}

/* The first thread has no memory of its own any more: either the process is about to end,
 * or it lives on in its other threads. */
static int lives_without_leader(int pidfd)
{
    if (!leaderless)
        leaderless = !has_ended(pidfd, 10 * VALVE_NS_PER_MS);
    return leaderless;
}

enum helper_duty helper_duty(int pidfd)
{
    char byte;
    if (has_ended(pidfd, 0))
        return DUTY_OVER;
    if (kcmp_works ? compare_memory() == 0 : image_at_start == 0 || image() == image_at_start)
        return DUTY_SERVE;
    /* Another address space: exec.  (If we may not look: it has become a program that we
     * could not serve.) */
    long got = read_auxv(&byte, 1);
    if (got != 0 && got != -ESRCH)
        return DUTY_HAND_OVER;
    return lives_without_leader(pidfd) ? DUTY_SERVE : DUTY_OVER;
}

void helper_stop_process(int pidfd)
{
    if (helper_duty(pidfd) != DUTY_SERVE)
        SYS1(SYS_exit_group, 0);
    if (pidfd < 0 || SYS4(SYS_pidfd_send_signal, pidfd, SIGSTOP, NULL, 0) < 0)
        SYS2(SYS_kill, valve.main_pid, SIGSTOP);
}
