/* SPDX-License-Identifier: Apache-2.0
 * Sentences for people: stderr and valve_last_error().  No libc, see sys.h. */
#include "state.h"
#include "sys.h"

static size_t join(char *to, size_t size, const char *const *parts)
{
    size_t n = 0;
    for (; *parts; parts++)
        for (const char *c = *parts; *c && n + 1 < size; c++)
            to[n++] = *c >= 0 && *c < ' ' ? '?' : *c; /* others' text must not steer a terminal */
    to[n] = 0;
    return n;
}

void valve_say(const char *const *parts)
{
    char line[640] = "valve: ";
    size_t n = 7 + join(line + 7, sizeof line - 8, parts);
    line[n++] = '\n';
    /* Never wait: a reader of stderr may itself wait for this process.  A full or closed
     * stderr loses the line; there is nobody else to tell. */
    struct pollfd room = {2, POLLOUT, 0};
    if (sys_poll(&room, 1, 0) == 1 && room.revents == POLLOUT)
        (void)SYS3(SYS_write, 2, line, n);
}

/* Readers hold a pointer into a buffer that is rewritten four messages later. */
void valve_set_error(const char *const *parts)
{
    uint32_t turn = atomic_load(&valve.error_turn) + 1;
    join(valve.errors[turn % 4], sizeof valve.errors[0], parts);
    atomic_store(&valve.error_turn, turn);
}

const char *valve_last_error(void)
{
    return valve.errors[atomic_load(&valve.error_turn) % 4];
}

const char *valve_decimal(uint64_t value, char buffer[24])
{
    char *at = buffer + 23;
    *at = 0;
    do
        *--at = (char)('0' + value % 10);
    while (value /= 10);
    return at;
}

void valve_copy_text(char *to, size_t size, const char *from)
{
    size_t n = 0;
    for (; from[n] && n + 1 < size; n++)
        to[n] = from[n];
    for (; n < size; n++)
        to[n] = 0;
}
