/* SPDX-License-Identifier: Apache-2.0
 *
 * The arena of a process on a GPU.  See arena_nvidia.c for who may call what.
 */
#ifndef VALVE_ARENA_NVIDIA_H
#define VALVE_ARENA_NVIDIA_H

#include <stdint.h>

/* In the engine's thread: reserve address space for `bytes` (0: as much as the tenant may hold) on
 * quarantine and tell the agent where.  0, or -1 and valve_last_error() says why.  Idempotent. */
int valve_nvidia_open(uint64_t bytes, uint64_t timeout_ns);

/* Where the arena lies; 0 before it was opened. */
uint64_t valve_nvidia_base(void);

#endif
