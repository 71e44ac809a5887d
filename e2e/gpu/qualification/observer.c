/* SPDX-License-Identifier: Apache-2.0
 *
 * Watches from outside a word that a victim's kernel writes all the time:
 *
 *   observer FILE
 *
 * FILE is shared with the victim. Word 0 is the kernel's. Written here: word 128, when word 0 was
 * last seen to change (CLOCK_MONOTONIC, ns); 129, how often; 130, when it was last looked at.
 * It looks without pause until its parent ends or kills it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int main(int argc, char **argv)
{
    int fd = argc == 2 ? open(argv[1], O_RDWR) : -1;
    volatile uint64_t *word = fd < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (word == MAP_FAILED) {
        perror("observer FILE");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (uint64_t last = word[0];;) {
        uint64_t value = word[0], now = now_ns();
        if (value != last) {
            last = value;
            word[128] = now;
            word[129]++;
        }
        word[130] = now;
    }
}
