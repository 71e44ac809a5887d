/* SPDX-License-Identifier: Apache-2.0
 *
 * The online side of `valve bench preempt`: a process that turns busy and idle
 * through libvalve, as an engine does.  The gate measures from libvalve's own time
 * stamp to the moment offline is known to be off.
 *
 *   online HOLD_US GAP_US COUNTERS_FILE SPINNERS LIBVALVE PAGE_FD
 *
 * PAGE_FD is the page that the agent gave to this process, to see the gate's state.
 * For each line "N" on stdin: N cycles, then as one uint64_t on stdout the number of
 * cycles in which a counter moved while the gate said paused.  It ends at end of file.
 */
#define _GNU_SOURCE
#include "cycle.h"
#include "valve_protocol.h"
#include <dlfcn.h>

static void *need(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (!found) {
        fprintf(stderr, "online: %s\n", dlerror());
        exit(2);
    }
    return found;
}

int main(int argc, char **argv)
{
    if (argc != 7)
        die_usage("online HOLD_US GAP_US COUNTERS_FILE SPINNERS LIBVALVE PAGE_FD");
    struct cycle c;
    cycle_init(&c, argv + 1);
    struct valve_page *page =
        mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[6]), 0);
    if (page == MAP_FAILED)
        die("page");
    const _Atomic uint32_t *gate = (const _Atomic uint32_t *)&page->gate;
    void *library = dlopen(argv[5], RTLD_NOW);
    if (!library) {
        fprintf(stderr, "online: %s\n", dlerror());
        return 2;
    }
    void (*busy)(void) = (void (*)(void))need(library, "valve_busy");
    void (*idle)(uint64_t) = (void (*)(uint64_t))need(library, "valve_idle");
    int (*connected)(void) = (int (*)(void))need(library, "valve_connected");

    busy(); /* an online process connects at its first request */
    while (!connected())
        usleep(1000);
    idle(0);
    char line[32];
    uint64_t moved = 0;
    if (write(1, &moved, sizeof moved) != sizeof moved)
        return 2;
    while (fgets(line, sizeof line, stdin)) {
        long cycles = atol(line);
        moved = 0;
        for (long i = 0; i < cycles; i++) {
            while (*gate != 1)
                usleep(200);
            cycle_gap(&c);
            busy();
            cycle_hold(&c, gate, 2);
            moved += cycle_moved(&c);
            idle(0);
        }
        if (write(1, &moved, sizeof moved) != sizeof moved)
            return 2;
    }
    return 0;
}
