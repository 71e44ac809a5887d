/* SPDX-License-Identifier: Apache-2.0
 * libcuda's functions by name: see cuda_api.h. */
#include "cuda_api.h"
#include "gpu.h"

#include <dlfcn.h>
#include <pthread.h>

static struct cuda_api api;
static int found;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void find_all(void)
{
    static const struct {
        const char *name;
        size_t at;
    } FUNCTIONS[] = {
        {"cuInit", offsetof(struct cuda_api, init)},
        {"cuCtxGetCurrent", offsetof(struct cuda_api, context)},
        {"cuCtxSetCurrent", offsetof(struct cuda_api, set_context)},
        {"cuCtxGetDevice", offsetof(struct cuda_api, context_device)},
        {"cuDevicePrimaryCtxRetain", offsetof(struct cuda_api, retain_primary)},
        {"cuDeviceGetUuid_v2", offsetof(struct cuda_api, uuid)},
        {"cuMemAddressReserve", offsetof(struct cuda_api, reserve)},
        {"cuMemAddressFree", offsetof(struct cuda_api, unreserve)},
        {"cuMemImportFromShareableHandle", offsetof(struct cuda_api, import)},
        {"cuMemRelease", offsetof(struct cuda_api, release)},
        {"cuMemMap", offsetof(struct cuda_api, map)},
        {"cuMemSetAccess", offsetof(struct cuda_api, set_access)},
        {"cuMemUnmap", offsetof(struct cuda_api, unmap)},
        {"cuMemsetD8Async", offsetof(struct cuda_api, fill)},
    };
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    for (size_t i = 0; library && i < sizeof FUNCTIONS / sizeof FUNCTIONS[0]; i++) {
        void *function = gpu_real_dlsym(library, FUNCTIONS[i].name); /* dlsym would find our hooks */
        if (function == NULL)
            return;
        *(void **)((char *)&api + FUNCTIONS[i].at) = function;
    }
    found = library != NULL;
}

const struct cuda_api *cuda_api(void)
{
    pthread_once(&once, find_all);
    return found ? &api : NULL;
}
