/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine: the process that plays the GPU for this CUDA process (gpu.h says why it is one).
 * Its first thread executes the supervisor's commands on the page tables, i.e. mmap; each further
 * thread is one channel. They have no thread control block of their own, so: raw system calls only,
 * no errno, no libc beyond memcpy and the vDSO clock.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>

#include "cuda_fake.h"

enum { STACK = 64 * 1024, KERNEL_SIGSET = 8 };

static long raw(long nr, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
    long r;
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(r) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return r;
#else
    register long x8 __asm__("x8") = nr, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
#endif
}
#define CALL(nr, a, b, c, d, e, f) \
    raw(nr, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

/* At the lowest address of its own stack, which is aligned to its size: found again from any frame. */
struct worker {
    struct fakenv_shared *shared;
    struct fakenv_slot *slot;
    void *dropped[5]; /* __builtin_setjmp: where an abort returns to */
};

static void wake(void *word)
{
    CALL(SYS_futex, word, FUTEX_WAKE, INT_MAX, 0, 0, 0);
}

static void sleep_on(void *word, uint32_t value, long timeout_ns)
{
    struct timespec t = {.tv_nsec = timeout_ns};
    CALL(SYS_futex, word, FUTEX_WAIT, value, timeout_ns ? &t : NULL, 0, 0);
}

static void park(struct worker *w)
{
    struct fakenv_slot *s = w->slot;
    for (;;) {
        atomic_store(&s->state, ST_PARKED);
        atomic_fetch_add(&s->evictions, 1);
        wake(&s->state);
        for (;;) {
            uint32_t bell = atomic_load(&s->bell);
            if (atomic_load(&s->abort))
                __builtin_longjmp(w->dropped, 1);
            if (atomic_load(&s->run) == RUN_ON)
                break;
            sleep_on(&s->bell, bell, 0);
        }
        atomic_store(&s->state, ST_RUNNING);
        if (atomic_load(&s->run) != RUN_EVICT)
            return;
    }
}

void cta(struct worker *w)
{
    atomic_fetch_add_explicit(&w->slot->ctas, 1, memory_order_relaxed);
    if (atomic_load(&w->slot->run) == RUN_EVICT)
        park(w);
}

/* False: the channel was told to drop its work, or lost its turn, before the semaphores were reached. */
static bool acquire(struct worker *w, const struct fakenv_entry *e)
{
    for (int i = 0; i < 2; i++) {
        _Atomic uint64_t *at = (_Atomic uint64_t *)(uintptr_t)e->wait_at[i];
        for (uint64_t have; at && (have = atomic_load(at)) < e->wait_for[i];) {
            if (atomic_load(&w->slot->abort))
                return false;
            sleep_on(at, (uint32_t)have, 5000000);
        }
    }
    atomic_store(&w->slot->state, ST_RUNNING);
    if (atomic_load(&w->slot->run) == RUN_ON)
        return true;
    atomic_store(&w->slot->state, ST_IDLE);
    wake(&w->slot->state);
    return false;
}

static __attribute__((noinline)) void execute(struct worker *w)
{
    struct fakenv_slot *s = w->slot;
    struct fakenv_entry *e = &s->ring[atomic_load(&s->get) % FAKENV_RING];
    if (__builtin_setjmp(w->dropped))
        return;
    if (!acquire(w, e))
        return;
    kernels[e->op < kernel_count ? e->op : OP_NOP].run(w, e);
    if (e->done_at) {
        atomic_store((_Atomic uint64_t *)(uintptr_t)e->done_at, e->done_value);
        wake((void *)(uintptr_t)e->done_at);
    }
    atomic_fetch_add(&s->get, 1);
    atomic_store(&s->state, ST_IDLE);
    wake(&s->get);
    if (atomic_load(&s->run) != RUN_ON)
        wake(&s->state);
}

static int channel_thread(void *argument)
{
    struct worker *w = argument;
    struct fakenv_slot *s = w->slot;
    for (;;) {
        uint32_t bell = atomic_load(&s->bell);
        if (atomic_load(&s->abort)) {
            atomic_store(&s->get, atomic_load(&s->put));
            atomic_store(&s->state, ST_IDLE);
            atomic_store(&s->abort, 0);
            wake(&s->state);
        }
        if (atomic_load(&s->run) == RUN_ON && atomic_load(&s->get) != atomic_load(&s->put))
            execute(w);
        else
            sleep_on(&s->bell, bell, 0);
    }
    return 0;
}

/* A kernel touched what is not mapped: an MMU fault. The channel dies, the context is poisoned. */
static void on_fault(int number, siginfo_t *info, void *unused)
{
    struct worker *w = (struct worker *)((uintptr_t)__builtin_frame_address(0) & ~(uintptr_t)(STACK - 1));
    atomic_store(&w->shared->fault_address, (uint64_t)(uintptr_t)info->si_addr);
    atomic_store(&w->slot->state, ST_DEAD);
    atomic_store(&w->shared->xid, 31);
    wake(&w->slot->state);
    wake(&w->slot->get);
    CALL(SYS_exit, 0, 0, 0, 0, 0, 0);
}

static long start_slot(struct fakenv_shared *shared, unsigned index)
{
    static bool live[FAKENV_SLOTS];
    struct fakenv_slot *s = &shared->slot[index];
    if (live[index] && atomic_load(&s->state) != ST_DEAD) {
        while (atomic_load(&s->abort)) /* the channel that had this slot is being dropped */
            CALL(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
        return 0;
    }
    long at = CALL(SYS_mmap, 0, 2 * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at < 0)
        return at;
    struct worker *w = (struct worker *)((at + STACK - 1) & ~(long)(STACK - 1));
    *w = (struct worker){.shared = shared, .slot = s};
    atomic_store(&s->get, atomic_load(&s->put));
    atomic_store(&s->abort, 0);
    atomic_store(&s->state, ST_IDLE);
    live[index] = true;
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
    return clone(channel_thread, (char *)w + STACK, flags, w) < 0 ? -EAGAIN : 0;
}

static long map(const struct engine_command *c, int fd)
{
    int how = MAP_FIXED | (c->op == ENGINE_MAP ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);
    long at = CALL(SYS_mmap, c->base, c->length, c->op == ENGINE_UNMAP ? PROT_NONE : PROT_READ | PROT_WRITE, how,
                   c->op == ENGINE_MAP ? fd : -1, c->op == ENGINE_MAP ? c->offset : 0);
    return at < 0 && at > -4096 ? at : 0;
}

static struct { struct fakenv_shared *shared; int command_fd; } start;

static int engine_main(void *unused)
{
    struct { void (*handler)(int, siginfo_t *, void *); unsigned long flags; void *restorer; uint64_t mask; } action = {
        on_fault, SA_SIGINFO | 0x04000000 /* SA_RESTORER: the handler never returns */, (void *)on_fault, ~0ull};
    uint64_t blocked = ~(1ull << (SIGSEGV - 1) | 1ull << (SIGBUS - 1));

    CALL(SYS_rt_sigprocmask, SIG_SETMASK, &blocked, NULL, KERNEL_SIGSET, 0, 0);
    CALL(SYS_rt_sigaction, SIGSEGV, &action, NULL, KERNEL_SIGSET, 0, 0);
    CALL(SYS_rt_sigaction, SIGBUS, &action, NULL, KERNEL_SIGSET, 0, 0);
    CALL(SYS_setpgid, 0, 0, 0, 0, 0, 0); /* a stop of the process's group is not for us */
    CALL(SYS_prctl, PR_SET_NAME, "fakenv-gpu", 0, 0, 0, 0);
    if (start.command_fd != 0)
        CALL(SYS_dup3, start.command_fd, 0, 0, 0, 0, 0);
    CALL(SYS_close_range, 1, UINT_MAX, 0, 0, 0, 0);

    for (;;) {
        struct engine_command c;
        char space[CMSG_SPACE(sizeof(int))];
        struct iovec iov = {&c, sizeof c};
        struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
        long n = CALL(SYS_recvmsg, 0, &m, 0, 0, 0, 0);
        int fd = -1;
        if (n == -EINTR)
            continue;
        if (n != (long)sizeof c)
            CALL(SYS_exit_group, 0, 0, 0, 0, 0, 0);
        struct cmsghdr *h = m.msg_controllen >= sizeof(struct cmsghdr) ? CMSG_FIRSTHDR(&m) : NULL;
        if (h)
            memcpy(&fd, CMSG_DATA(h), sizeof fd);
        long result = c.op == ENGINE_START_SLOT ? start_slot(start.shared, c.slot) : map(&c, fd);
        if (fd >= 0)
            CALL(SYS_close, fd, 0, 0, 0, 0, 0);
        struct engine_answer answer = {(int32_t)result};
        CALL(SYS_sendto, 0, &answer, sizeof answer, MSG_NOSIGNAL, 0, 0);
    }
    return 0;
}

int engine_start(struct fakenv_shared *shared, int command_fd)
{
    char *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED)
        return -1;
    start.shared = shared;
    start.command_fd = command_fd;
    /* No exit signal: the process never learns of it from wait(), as it would not of a GPU. */
    return clone(engine_main, stack + STACK, CLONE_VM | CLONE_FS, NULL);
}
