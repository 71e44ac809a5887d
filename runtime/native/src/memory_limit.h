/* SPDX-License-Identifier: Apache-2.0
 *
 * How much GPU memory an offline process may allocate by itself, beside its arena.  Called by
 * the hooks of gpu_launch.c (which find CUDA's and NVML's functions) and by page.c.
 */
#ifndef VALVE_MEMORY_LIMIT_H
#define VALVE_MEMORY_LIMIT_H

#include <stdint.h>

/* Is it the name of a function that allocates or frees device memory, or says how much there is?
 * `is_symbol`: a name as libraries export it, where one without a version may mean the 32-bit
 * functions of before CUDA 3.2; those are left alone. */
int memory_limit_wants(const char *name, int is_symbol);

/* What to call instead of `real`, a function of that name; `real` itself when there is no room for more. */
void *memory_limit_wrap(const char *name, void *real);

/* Bytes that this process has allocated beside its arena. */
uint64_t memory_limit_used(void);

/* A forked child has nothing. */
void memory_limit_forked(void);

#endif
