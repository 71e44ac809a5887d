/* SPDX-License-Identifier: Apache-2.0
 *
 * Raw system calls.  The control loop may run in the address-space helper, which
 * shares memory and the thread pointer with the process it serves: it must not
 * touch errno, locks or any other state of libc.  Every call returns the kernel's
 * value: >= 0, or -errno.
 */
#ifndef VALVE_SYS_H
#define VALVE_SYS_H

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>

static inline long sys6(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc #0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                     : "memory");
    return x0;
#else
#error "libvalve knows the system call convention of x86_64 and aarch64 only"
#endif
}

#define SYS0(n) sys6(n, 0, 0, 0, 0, 0, 0)
#define SYS1(n, a) sys6(n, (long)(a), 0, 0, 0, 0, 0)
#define SYS2(n, a, b) sys6(n, (long)(a), (long)(b), 0, 0, 0, 0)
#define SYS3(n, a, b, c) sys6(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define SYS4(n, a, b, c, d) sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define SYS5(n, a, b, c, d, e) sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)
#define SYS6(n, a, b, c, d, e, f) \
    sys6(n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

static inline int sys_close(int fd) { return (int)SYS1(SYS_close, fd); }
static inline int sys_getpid(void) { return (int)SYS0(SYS_getpid); }
static inline int sys_getppid(void) { return (int)SYS0(SYS_getppid); }
static inline int sys_gettid(void) { return (int)SYS0(SYS_gettid); }
static inline int sys_fcntl(int fd, int op, long arg) { return (int)SYS3(SYS_fcntl, fd, op, arg); }

static inline long sys_mmap(void *at, size_t bytes, int prot, int flags, int fd, uint64_t offset)
{
    return SYS6(SYS_mmap, at, bytes, prot, flags, fd, offset);
}

static inline int sys_munmap(void *at, size_t bytes) { return (int)SYS2(SYS_munmap, at, bytes); }

static inline int sys_madvise(void *at, size_t bytes, int advice)
{
    return (int)SYS3(SYS_madvise, at, bytes, advice);
}

/* mmap's error values are the last page of the address space. */
static inline int sys_failed(long result) { return result < 0 && result > -4096; }

static inline uint64_t sys_now_ns(void)
{
    struct timespec now = {0, 0};
    SYS2(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline struct timespec sys_timespec(uint64_t ns)
{
    return (struct timespec){(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
}

static inline void sys_sleep_ns(uint64_t ns)
{
    struct timespec wait = sys_timespec(ns);
    SYS4(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &wait, NULL);
}

static inline int sys_poll(struct pollfd *fds, unsigned count, uint64_t timeout_ns)
{
    struct timespec wait = sys_timespec(timeout_ns);
    return (int)SYS5(SYS_ppoll, fds, count, &wait, NULL, 0);
}

static inline int sys_futex_wait(const void *word, uint32_t value, uint64_t timeout_ns)
{
    struct timespec wait = sys_timespec(timeout_ns);
    return (int)SYS4(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &wait);
}

/* For a word in memory shared with another process. */
static inline int sys_futex_wait_shared(const void *word, uint32_t value, uint64_t timeout_ns)
{
    struct timespec wait = sys_timespec(timeout_ns);
    return (int)SYS4(SYS_futex, word, FUTEX_WAIT, value, &wait);
}

static inline void sys_futex_wake_all(const void *word)
{
    SYS3(SYS_futex, word, FUTEX_WAKE_PRIVATE, 0x7fffffff);
}

#endif
