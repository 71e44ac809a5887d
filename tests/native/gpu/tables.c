/* SPDX-License-Identifier: Apache-2.0
 *
 * Drives the tables of files and objects directly, in an order that needs two threads in a real process.
 * Compiled together with libvalve's sources; prints one line for each step. */
#include "gpu.h"
#include "nv_abi.h"

#include <stdio.h>

enum { CLIENT = 0x10, DEVICE, SUBDEVICE, FIRST, SECOND };
#define CTL "/dev/nvidiactl"

static void step(const char *name)
{
    printf("%s:", name);
    for (uint32_t handle = FIRST; handle <= SECOND; handle++)
        for (uint32_t i = 0; i < GPU_TABLE->slots; i++)
            if (GPU_TABLE->channels[i].state && GPU_TABLE->channels[i].channel == handle)
                printf(" %s", handle == FIRST ? "first" : "second");
    puts("");
}

static void add(uint32_t parent, uint32_t object, uint32_t hclass)
{
    gpu_object_added(&(struct gpu_new){CLIENT, parent, object, hclass, 1, 0});
}

static void refused_frees(void)
{
    add(0, CLIENT, NV_ROOT);
    add(CLIENT, DEVICE, NV_DEVICE);
    add(DEVICE, SUBDEVICE, NV_SUBDEVICE);
    add(DEVICE, FIRST, 0xc86f);
    add(DEVICE, SECOND, 0xc86f);
    step("made");
    uint32_t one = gpu_object_freeing(CLIENT, FIRST), all = gpu_object_freeing(CLIENT, DEVICE);
    step("both under way");
    gpu_object_freed(all, 0);
    step("the device refused");
    gpu_object_freed(one, 0);
    step("the channel refused");
}

static void numbers(void)
{
    gpu_file_opened(50, CTL);
    printf("number %d\n", gpu_file_of(50));
    GPU_TABLE->taken = 1; /* by the agent */
    gpu_file_closing(50);
    gpu_file_opened(51, CTL);
    printf("while taken %d\n", gpu_file_of(51));
    GPU_TABLE->taken = 0;
    gpu_file_opened(52, CTL);
    printf("let go %d\n", gpu_file_of(52));
}

int main(void)
{
    refused_frees();
    numbers();
    return 0;
}
