/* SPDX-License-Identifier: Apache-2.0
 *
 * A subset of NVML over the fake device: what an agent and pynvml ask for. It opens the control
 * file and allocates an RM client of its own, so a process that uses CUDA and NVML has two clients.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "abi.h"
#include "gpu.h"

#define API __attribute__((visibility("default")))
typedef enum {
    NVML_SUCCESS = 0,
    NVML_ERROR_UNINITIALIZED = 1,
    NVML_ERROR_INVALID_ARGUMENT = 2,
    NVML_ERROR_NOT_SUPPORTED = 3,
    NVML_ERROR_NOT_FOUND = 6,
    NVML_ERROR_INSUFFICIENT_SIZE = 7,
    NVML_ERROR_DRIVER_NOT_LOADED = 9,
    NVML_ERROR_TIMEOUT = 10,
    NVML_ERROR_GPU_IS_LOST = 15,
    NVML_ERROR_UNKNOWN = 999,
} nvmlReturn_t;
typedef const uint8_t *nvmlDevice_t; /* points into `devices`: its offset is the index */
typedef struct { uint64_t total, free, used; } nvmlMemory_t;
typedef struct { uint32_t version; uint64_t total, reserved, free, used; } nvmlMemory_v2_t;
typedef struct { uint32_t gpu, memory; } nvmlUtilization_t;
typedef struct { uint32_t pid; uint64_t used; uint32_t gpu_instance, compute_instance; } nvmlProcessInfo_t;
typedef struct { char legacy[16]; uint32_t domain, bus, device, id, subsystem; char bus_id[32]; } nvmlPciInfo_t;
typedef struct { uint32_t pid; uint64_t stamp_us; uint32_t sm, memory, encoder, decoder; } nvmlProcessUtilizationSample_t;
typedef struct { nvmlDevice_t device; uint64_t type, data; uint32_t gpu_instance, compute_instance; } nvmlEventData_t;
enum { EVENT_XID = 8 };
typedef struct { uint64_t seen[FAKENV_MAX_GPUS]; uint8_t watched[FAKENV_MAX_GPUS]; } *nvmlEventSet_t;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int users, ctl = -1;
static uint8_t devices[FAKENV_MAX_GPUS];

API const char *nvmlErrorString(nvmlReturn_t r)
{
    switch (r) {
    case NVML_SUCCESS: return "The operation was successful";
    case NVML_ERROR_UNINITIALIZED: return "Uninitialized";
    case NVML_ERROR_INVALID_ARGUMENT: return "Invalid Argument";
    case NVML_ERROR_NOT_SUPPORTED: return "Not Supported";
    case NVML_ERROR_NOT_FOUND: return "Not Found";
    case NVML_ERROR_INSUFFICIENT_SIZE: return "Insufficient Size";
    case NVML_ERROR_DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case NVML_ERROR_TIMEOUT: return "Timeout";
    case NVML_ERROR_GPU_IS_LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}

API nvmlReturn_t nvmlInitWithFlags(unsigned flags)
{
    nvmlReturn_t r = NVML_SUCCESS;
    struct nvos21 root = {.hclass = NV01_ROOT_CLIENT};
    pthread_mutex_lock(&lock);
    if (users == 0) {
        ctl = open("/dev/nvidiactl", O_RDWR | O_CLOEXEC);
        if (ctl < 0)
            r = NVML_ERROR_DRIVER_NOT_LOADED;
        else if (ioctl(ctl, _IOWR('F', NV_ESC_RM_ALLOC, struct nvos21), &root) < 0 || root.status)
            r = NVML_ERROR_UNKNOWN;
    }
    users += r == NVML_SUCCESS;
    pthread_mutex_unlock(&lock);
    return r;
}

API nvmlReturn_t nvmlInit_v2(void)
{
    return nvmlInitWithFlags(0);
}

API nvmlReturn_t nvmlShutdown(void)
{
    pthread_mutex_lock(&lock);
    nvmlReturn_t r = users ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
    if (users && --users == 0)
        close(ctl);
    pthread_mutex_unlock(&lock);
    return r;
}

static nvmlReturn_t ask(unsigned gpu, struct fakenv_query *q)
{
    memset(q, 0, sizeof *q);
    q->gpu = gpu;
    if (!users)
        return NVML_ERROR_UNINITIALIZED;
    if (ioctl(ctl, _IOWR('F', FAKENV_ESC_QUERY, struct fakenv_query), q) < 0)
        return NVML_ERROR_UNKNOWN;
    return q->status ? NVML_ERROR_INVALID_ARGUMENT : NVML_SUCCESS;
}

/* As ask(), for a handle; a lost GPU answers nothing any more. */
static nvmlReturn_t ask_device(nvmlDevice_t device, struct fakenv_query *q)
{
    memset(q, 0, sizeof *q);
    if (device < devices || device >= devices + FAKENV_MAX_GPUS)
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t r = ask((unsigned)(device - devices), q);
    return r ? r : q->lost ? NVML_ERROR_GPU_IS_LOST : NVML_SUCCESS;
}

static nvmlReturn_t text(char *out, unsigned length, const char *value)
{
    return snprintf(out, length, "%s", value) < (int)length ? NVML_SUCCESS : NVML_ERROR_INSUFFICIENT_SIZE;
}

API nvmlReturn_t nvmlSystemGetDriverVersion(char *out, unsigned length)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask(0, &q);
    return r ? r : text(out, length, q.version);
}

API nvmlReturn_t nvmlSystemGetNVMLVersion(char *out, unsigned length)
{
    return nvmlSystemGetDriverVersion(out, length);
}

API nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    *version = 13000;
    return users ? NVML_SUCCESS : NVML_ERROR_UNINITIALIZED;
}

API nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version)
{
    return nvmlSystemGetCudaDriverVersion_v2(version);
}

API nvmlReturn_t nvmlDeviceGetCount_v2(unsigned *count)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask(0, &q);
    *count = q.gpus;
    return r;
}

API nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask(index, &q);
    *device = r ? NULL : devices + index;
    return r;
}

static void uuid_text(const struct fakenv_query *q, char out[48])
{
    const uint8_t *u = q->uuid;
    snprintf(out, 48, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1], u[2],
             u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
}

static void bus_id(unsigned index, char out[32])
{
    snprintf(out, 32, "00000000:%02X:00.0", index + 1);
}

API nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *out, unsigned length)
{
    struct fakenv_query q;
    char uuid[48];
    nvmlReturn_t r = ask_device(device, &q);
    uuid_text(&q, uuid);
    return r ? r : text(out, length, uuid);
}

API nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    struct fakenv_query q;
    char have[48];
    for (unsigned i = 0; ask(i, &q) == NVML_SUCCESS; i++) {
        uuid_text(&q, have);
        if (strcmp(have, uuid) == 0)
            return nvmlDeviceGetHandleByIndex_v2(i, device);
    }
    return users ? NVML_ERROR_NOT_FOUND : NVML_ERROR_UNINITIALIZED;
}

API nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *id, nvmlDevice_t *device)
{
    struct fakenv_query q;
    char have[32];
    for (unsigned i = 0; ask(i, &q) == NVML_SUCCESS; i++) {
        bus_id(i, have);
        if (strcasecmp(have, id) == 0 || strcasecmp(have + 4, id) == 0)
            return nvmlDeviceGetHandleByIndex_v2(i, device);
    }
    return users ? NVML_ERROR_NOT_FOUND : NVML_ERROR_UNINITIALIZED;
}

API nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *out, unsigned length)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask_device(device, &q);
    return r ? r : text(out, length, q.name);
}

API nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask_device(device, &q);
    *index = q.gpu;
    return r;
}

API nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *minor)
{
    return nvmlDeviceGetIndex(device, minor);
}

API nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *m)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask_device(device, &q);
    *m = (nvmlMemory_t){q.total_bytes, q.total_bytes - q.used_bytes, q.used_bytes};
    return r;
}

API nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *m)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask_device(device, &q);
    *m = (nvmlMemory_v2_t){m->version, q.total_bytes, 0, q.total_bytes - q.used_bytes, q.used_bytes};
    return r;
}

API nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *u)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask_device(device, &q);
    *u = (nvmlUtilization_t){q.running ? 100 : 0, 0}; /* an instant, not an average */
    return r;
}

API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *out)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask_device(device, &q);
    unsigned room = *count;
    if (r)
        return r;
    *count = q.process_count;
    if (q.process_count > room)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < q.process_count; i++)
        out[i] = (nvmlProcessInfo_t){q.process[i].pid, q.process[i].used_bytes, UINT32_MAX, UINT32_MAX};
    return NVML_SUCCESS;
}

API nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *out)
{
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, out);
}

API nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t *out,
                                                 unsigned *count, unsigned long long since)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask_device(device, &q);
    return r ? r : NVML_ERROR_NOT_FOUND; /* no samples are kept */
}

API nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *p)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask_device(device, &q);
    *p = (nvmlPciInfo_t){.bus = q.gpu + 1, .id = 0x233010de};
    bus_id(q.gpu, p->bus_id);
    snprintf(p->legacy, sizeof p->legacy, "%s", p->bus_id + 4);
    return r;
}

API nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask_device(device, &q);
    *major = 9, *minor = 0;
    return r;
}

/* ---- events: Xids, by looking every 10 ms ---- */

API nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long *types)
{
    struct fakenv_query q;
    *types = EVENT_XID;
    return ask_device(device, &q);
}

API nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *set)
{
    *set = calloc(1, sizeof **set);
    return !users ? NVML_ERROR_UNINITIALIZED : *set ? NVML_SUCCESS : NVML_ERROR_UNKNOWN;
}

API nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set)
{
    free(set);
    return NVML_SUCCESS;
}

API nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, nvmlEventSet_t set)
{
    struct fakenv_query q;
    nvmlReturn_t r = ask_device(device, &q);
    if (r || types & ~(unsigned long long)EVENT_XID)
        return r ? r : NVML_ERROR_NOT_SUPPORTED;
    set->watched[q.gpu] = 1;
    set->seen[q.gpu] = q.xid_count;
    return NVML_SUCCESS;
}

API nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t *event, unsigned timeout_ms)
{
    for (unsigned waited = 0;; waited += 10) {
        for (unsigned i = 0; i < FAKENV_MAX_GPUS; i++) {
            struct fakenv_query q;
            if (!set->watched[i] || ask(i, &q) || q.xid_count == set->seen[i])
                continue;
            set->seen[i] = q.xid_count;
            *event = (nvmlEventData_t){devices + i, EVENT_XID, q.xid, UINT32_MAX, UINT32_MAX};
            return NVML_SUCCESS;
        }
        if (waited >= timeout_ms)
            return NVML_ERROR_TIMEOUT;
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
}
