/* SPDX-License-Identifier: Apache-2.0
 *
 * Preloaded into a process that libvalve is not in: which calls libcuda makes of the driver, one line
 * each, appended to the file in VALVE_TRACE:
 *
 *   alloc 0xc86f: 0x00        RM_ALLOC of a class, and its status
 *   control 0x2080110b: 0x00  RM_CONTROL
 *   escape 201                any other escape of the control and GPU files
 *   uvm 33                    an ioctl of /dev/nvidia-uvm
 *
 * Where libvalve captures no channel, this says what was there to capture.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CONTROL = 0x2a, ALLOC = 0x2b, XFER = 211, WIDE_ALLOC = 48 };
struct xfer { uint32_t number, size; uint64_t body; };

static void say(const char *format, unsigned long first, unsigned long second)
{
    static int out = -1;
    char line[96];
    if (out < 0 && getenv("VALVE_TRACE"))
        out = open(getenv("VALVE_TRACE"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    int n = snprintf(line, sizeof line, format, first, second);
    if (out >= 0 && write(out, line, (size_t)n) != n)
        out = -1;
}

static uint32_t word(const void *body, unsigned at)
{
    uint32_t value;
    memcpy(&value, (const char *)body + at, sizeof value);
    return value;
}

static void look(int fd, unsigned long request, const void *argument)
{
    char link[64], path[64] = "";
    unsigned number = _IOC_NR(request), size = _IOC_SIZE(request);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) < 0 || strncmp(path, "/dev/nvidia", 11) != 0)
        return;
    if (strncmp(path, "/dev/nvidia-uvm", 15) == 0) {
        say("uvm %lu\n", request, 0);
        return;
    }
    if (_IOC_TYPE(request) != 'F' || !argument)
        return;
    if (number == XFER && size == sizeof(struct xfer)) {
        const struct xfer *wrapped = argument;
        number = wrapped->number, size = wrapped->size, argument = (const void *)(uintptr_t)wrapped->body;
    }
    if (number == ALLOC)
        say("alloc 0x%lx: 0x%02lx\n", word(argument, 12), word(argument, size == WIDE_ALLOC ? 40 : 28));
    else if (number == CONTROL)
        say("control 0x%lx: 0x%02lx\n", word(argument, 8), word(argument, 28));
    else
        say("escape %lu\n", number, 0);
}

__attribute__((visibility("default"))) int ioctl(int fd, unsigned long request, ...)
{
    static int (*next)(int, unsigned long, void *);
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (!next)
        next = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
    int result = next(fd, request, argument), saved = errno;
    if (result == 0)
        look(fd, request, argument);
    errno = saved;
    return result;
}
