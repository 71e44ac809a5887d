/* SPDX-License-Identifier: Apache-2.0
 *
 * What one call of the fake costs. Statically linked on purpose: it also shows that the fake needs
 * no interposition. Run as `fakenv run -- bench`; prints microseconds, asserts nothing.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "abi.h"

enum { COUNT = 20000, OPENS = 2000 };
static double samples[COUNT];

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(const char *what, int count)
{
    qsort(samples, (size_t)count, sizeof *samples, ascending);
    printf("%-40s p50 %6.1f us   p99 %6.1f us   max %8.1f us   n %d\n", what, samples[count / 2],
           samples[count * 99 / 100], samples[count - 1], count);
}

int main(void)
{
    int fd = open("/dev/nvidiactl", O_RDWR | O_CLOEXEC);
    struct nvos21 root = {.hclass = NV01_ROOT_CLIENT};
    if (fd < 0 || ioctl(fd, _IOWR('F', NV_ESC_RM_ALLOC, struct nvos21), &root) < 0 || root.status) {
        fprintf(stderr, "bench: no driver here; start it as: fakenv run -- bench\n");
        return 1;
    }
    for (int i = 0; i < COUNT; i++) {
        uint32_t ids[32];
        struct nvos54 control = {root.object, root.object, CTRL_GPU_GET_ATTACHED_IDS, 0, (uintptr_t)ids, sizeof ids, 0};
        double start = now_us();
        if (ioctl(fd, _IOWR('F', NV_ESC_RM_CONTROL, struct nvos54), &control) < 0 || control.status)
            return 1;
        samples[i] = now_us() - start;
    }
    report("RM_CONTROL (128-byte parameters)", COUNT);
    for (int i = 0; i < COUNT; i++) {
        double start = now_us();
        ioctl(1, _IOWR('F', 0x2a, struct nvos54), NULL);
        samples[i] = now_us() - start;
    }
    report("ioctl 'F' on a file that is not ours", COUNT);
    for (int i = 0; i < OPENS; i++) {
        double start = now_us();
        int other = open("/dev/null", O_RDONLY);
        samples[i] = now_us() - start;
        close(other);
    }
    report("open of an unrelated file", OPENS);
    for (int i = 0; i < OPENS; i++) {
        double start = now_us();
        int other = open("/dev/nvidiactl", O_RDWR);
        samples[i] = now_us() - start;
        close(other);
    }
    report("open of /dev/nvidiactl", OPENS);
    return 0;
}
