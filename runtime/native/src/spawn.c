/* SPDX-License-Identifier: Apache-2.0
 *
 * Starting the control loop as a thread or as the address-space helper.  Runs in the
 * process's own thread (constructor, first API call, or after fork in the child).
 */
#include "link.h"
#include "state.h"
#include "sys.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define STACK_BYTES (256u << 10)
#define GUARD_BYTES (64u << 10)

static void *thread_main(void *nothing)
{
    (void)nothing;
    pthread_setname_np(pthread_self(), "valve-control");
    valve_control_run(0);
    return NULL;
}

int valve_start_thread(void *(*run)(void *))
{
    sigset_t all, before;
    pthread_t thread;
    pthread_attr_t attributes;
    sigfillset(&all); /* signals are for the process's own threads */
    int result = pthread_attr_init(&attributes);
    if (result != 0)
        return -result;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    result = pthread_create(&thread, &attributes, run, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return -result;
}

int valve_spawn_thread(void) { return valve_start_thread(thread_main); }

/* By which the process's threads hand driver files to the control loop.  The control loop's end, or -errno. */
static int make_gpu_pipe(void)
{
    int ends[2];
    struct stat status;
    long result = SYS4(SYS_socketpair, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends);
    if (result < 0)
        return (int)result;
    ends[0] = link_move_high(ends[0]);
    if (ends[1] <= 2) { /* started with these closed: the helper has other use for them */
        int above = sys_fcntl(ends[1], F_DUPFD_CLOEXEC, 3);
        sys_close(ends[1]);
        ends[1] = above;
        if (above < 0) {
            sys_close(ends[0]);
            return above;
        }
    }
    SYS2(SYS_fstat, ends[0], &status);
    valve.gpu_pipe_inode = status.st_ino;
    valve.gpu_control_end = ends[1];
    atomic_store(&valve.gpu_pipe, ends[0]);
    return ends[1];
}

#ifdef VALVE_CONTROL_THREAD
/* Build for ThreadSanitizer, which does not know processes that share memory: the same
 * loop as a thread.  It stops with the process, so it keeps no promise; for tests only. */
int valve_spawn_helper(void)
{
    int result = make_gpu_pipe();
    return result < 0 ? result : valve_spawn_thread();
}
#else
static int helper_main(void *nothing)
{
    (void)nothing;
    valve_control_run(1);
    return 0;
}

int valve_spawn_helper(void)
{
    static char *stack; /* survives fork: the child's helper takes the copy */
    if (stack == NULL) {
        long at = sys_mmap(NULL, STACK_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
        if (sys_failed(at))
            return (int)at;
        SYS3(SYS_mprotect, at, GUARD_BYTES, PROT_NONE);
        stack = (char *)at;
    }
    int made = make_gpu_pipe();
    if (made < 0)
        return made;
    uint64_t all = ~0ull, before = 0;
    SYS4(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, sizeof all);
    int pid = clone(helper_main, stack + STACK_BYTES + GUARD_BYTES, CLONE_VM, NULL);
    int result = pid < 0 ? -errno : pid;
    SYS4(SYS_rt_sigprocmask, SIG_SETMASK, &before, NULL, sizeof before);
    sys_close(made); /* the helper has its own copy of that descriptor */
    return result;
}
#endif
