/* SPDX-License-Identifier: Apache-2.0
 *
 * An offline process for the gate's tests and the preempt bench: spinning threads
 * that count in a shared file, sleeping threads, and the odd leaders that a pause
 * must cope with.  It says "ready\n" on stdout and then works until killed.
 *
 *   victim COUNTERS_FILE SPINNERS SLEEPERS BARRIER LEADER
 *     BARRIER  1: register for membarrier as libvalve does
 *     LEADER   wait | zombie (leader exits, siblings go on) | vfork (leader sits in
 *              an uninterruptible wait while its child sleeps)
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *spin(void *at)
{
    volatile uint64_t *counter = at;
    for (;;)
        ++*counter;
    return NULL;
}

static void *rest(void *unused)
{
    (void)unused;
    for (;;)
        pause();
    return NULL;
}

static void die(const char *what)
{
    perror(what);
    exit(2);
}

int main(int argc, char **argv)
{
    if (argc != 6) {
        fprintf(stderr, "usage: victim COUNTERS_FILE SPINNERS SLEEPERS BARRIER LEADER\n");
        return 2;
    }
    int spinners = atoi(argv[2]), sleepers = atoi(argv[3]);
    int fd = open(argv[1], O_RDWR);
    if (fd < 0)
        die(argv[1]);
    /* one cache line per counter */
    uint64_t *counters = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (counters == MAP_FAILED)
        die("mmap");
    if (atoi(argv[4]) && syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) != 0)
        die("membarrier");
    pthread_t thread;
    for (int i = 0; i < spinners; i++)
        if (pthread_create(&thread, NULL, spin, counters + 8 * i) != 0)
            die("pthread_create");
    for (int i = 0; i < sleepers; i++)
        if (pthread_create(&thread, NULL, rest, NULL) != 0)
            die("pthread_create");
    if (write(1, "ready\n", 6) != 6)
        die("write");
    if (strcmp(argv[5], "zombie") == 0)
        pthread_exit(NULL);
    if (strcmp(argv[5], "vfork") == 0 && vfork() == 0) {
        prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0);
        for (;;)
            pause();
    }
    for (;;)
        pause();
}
