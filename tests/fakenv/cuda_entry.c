/* SPDX-License-Identifier: Apache-2.0
 *
 * Entry points by name, and error texts. What is not found is CUDA_ERROR_NOT_FOUND, which callers
 * tolerate; the undocumented export tables are not there on purpose.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "cuda_fake.h"

static const struct { CUresult code; const char *name, *text; } errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_MAP_FAILED, "CUDA_ERROR_MAP_FAILED", "mapping of buffer object failed"},
    {CUDA_ERROR_OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static CUresult describe(CUresult code, const char **out, bool name)
{
    for (unsigned i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) {
            *out = name ? errors[i].name : errors[i].text;
            return CUDA_SUCCESS;
        }
    *out = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuGetErrorName(CUresult code, const char **out)
{
    return describe(code, out, true);
}

API CUresult cuGetErrorString(CUresult code, const char **out)
{
    return describe(code, out, false);
}

/* Callers ask for a base name; what they get is the newest version that is here. */
static void *entry(const char *symbol)
{
    static const char *const suffixes[] = {"_v4", "_v2", "", NULL};
    char name[128];
    Dl_info here;
    if (!dladdr((void *)&cuda_lock, &here))
        return NULL;
    void *self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    for (int i = 0; self && suffixes[i]; i++) {
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        void *found = strncmp(symbol, "cu", 2) == 0 ? dlsym(self, name) : NULL;
        if (found)
            return found;
    }
    return NULL;
}

API CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags);

API CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status)
{
    bool first = version < 12000 && strcmp(symbol, "cuGetProcAddress") == 0; /* without `status` until CUDA 12 */
    *function = first ? (void *)cuGetProcAddress : entry(symbol);
    if (status)
        *status = *function ? 0 : 1; /* found, or symbol not found */
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

API CUresult cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}

API CUresult cuGetExportTable(const void **table, const void *id)
{
    *table = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}
