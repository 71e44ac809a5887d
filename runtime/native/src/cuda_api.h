/* SPDX-License-Identifier: Apache-2.0
 *
 * The few functions of the CUDA driver API that libvalve itself calls, found at run time: no
 * program is made to need libcuda, and what is found here is libcuda's own, never a hook of ours.
 * Called by the engine's threads and the memory thread, never by the control loop.
 */
#ifndef VALVE_CUDA_API_H
#define VALVE_CUDA_API_H

#include <stddef.h>
#include <stdint.h>

typedef int cuda_result; /* CUresult; 0 is success */
typedef uint64_t cuda_address;
typedef uint64_t cuda_handle; /* CUmemGenericAllocationHandle */
struct cuda_location {
    int type, id; /* type 1: a device */
};
struct cuda_access {
    struct cuda_location location;
    int flags; /* 3: read and write */
};
_Static_assert(sizeof(struct cuda_access) == 12, "CUmemAccessDesc");

enum { CUDA_OUT_OF_MEMORY = 2, CUDA_NOT_FOUND = 500, CUDA_POSIX_FD = 1 };

struct cuda_api {
    cuda_result (*init)(unsigned flags);
    cuda_result (*context)(void **context);
    cuda_result (*set_context)(void *context);
    cuda_result (*context_device)(int *device);
    cuda_result (*retain_primary)(void **context, int device);
    cuda_result (*uuid)(void *uuid, int device);
    cuda_result (*reserve)(cuda_address *base, size_t bytes, size_t alignment, cuda_address hint,
                           unsigned long long flags);
    cuda_result (*unreserve)(cuda_address base, size_t bytes);
    cuda_result (*import)(cuda_handle *handle, void *os_handle, int type);
    cuda_result (*release)(cuda_handle handle);
    cuda_result (*map)(cuda_address at, size_t bytes, size_t offset, cuda_handle handle, unsigned long long flags);
    cuda_result (*set_access)(cuda_address at, size_t bytes, const struct cuda_access *access, size_t count);
    cuda_result (*unmap)(cuda_address at, size_t bytes);
    cuda_result (*fill)(cuda_address at, unsigned char value, size_t bytes, void *stream);
};

/* libcuda's functions, or NULL when this process has no libcuda that knows all of them. */
const struct cuda_api *cuda_api(void);

#endif
