/* SPDX-License-Identifier: Apache-2.0
 *
 * What differs between the driver branches that the fake can be. Checked by compiling sizeof() on
 * the public headers of the versions that branch.c names; the same table is written down a second
 * time in tests/native/fakenv/test_fakenv_abi.py and asked of a running fake.
 */
#ifndef FAKENV_BRANCH_H
#define FAKENV_BRANCH_H
#include <stdint.h>

struct branch {
    const char *name, *version;
    uint16_t channel_params;   /* NV_CHANNEL_ALLOC_PARAMS */
    uint16_t vaspace_params;   /* NV_VASPACE_ALLOCATION_PARAMETERS */
    uint16_t memory_params;    /* NV_MEMORY_ALLOCATION_PARAMS */
    uint16_t schedule_params;  /* GPFIFO_SCHEDULE, of a TSG and of a channel */
    uint16_t probed_ids;       /* GPU_GET_PROBED_IDS */
    uint16_t name_string;      /* GPU_GET_NAME_STRING */
    uint16_t uvm_max_gpus;     /* entries of perGpuAttributes in UVM_MAP_EXTERNAL_ALLOCATION */
};

extern const struct branch branches[];
extern const unsigned branch_count;
/* The branch of that name ("580"), or NULL. */
const struct branch *branch_named(const char *name);
/* The branch whose layouts a driver of this version has: "580.159.03" -> 580; NULL when unknown. */
const struct branch *branch_of_version(const char *version);

#endif
