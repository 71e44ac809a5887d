/* SPDX-License-Identifier: Apache-2.0
 *
 * Devices and contexts. A context is one compute channel group with eight channels and one group
 * per copy engine with one channel each, which is the tree seen under a real libcuda.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cuda_fake.h"

enum { MAX_STACK = 8, CUDA_VERSION = 13000 };
static __thread struct context *stack[MAX_STACK];
static __thread int depth;

CUresult cuda_ready(void)
{
    return cuda.initialized && cuda.pid == getpid() ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult cuda_current(struct context **ctx)
{
    CUresult r = cuda_ready();
    if (r)
        return r;
    *ctx = depth ? stack[depth - 1] : NULL;
    return *ctx ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

/* ---- devices ---- */

API CUresult cuInit(unsigned flags)
{
    CUresult r = CUDA_SUCCESS;
    pthread_mutex_lock(&cuda_lock);
    if (!cuda.initialized) {
        uint32_t status = rm_connect();
        cuda.initialized = status == NV_OK;
        cuda.pid = getpid();
        r = cuda.ctl_fd < 0 ? CUDA_ERROR_NO_DEVICE : status ? CUDA_ERROR_SYSTEM_DRIVER_MISMATCH : CUDA_SUCCESS;
    }
    pthread_mutex_unlock(&cuda_lock);
    return flags ? CUDA_ERROR_INVALID_VALUE : r;
}

API CUresult cuDriverGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int *count)
{
    CUresult r = cuda_ready();
    if (!r)
        *count = (int)cuda.gpus;
    return r;
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal)
{
    CUresult r = cuda_ready();
    if (r)
        return r;
    *device = ordinal;
    return ordinal >= 0 && (unsigned)ordinal < cuda.gpus ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

static CUresult device_ok(CUdevice device)
{
    return cuDeviceGet(&device, device);
}

API CUresult cuDeviceGetName(char *name, int length, CUdevice device)
{
    CUresult r = device_ok(device);
    if (!r)
        snprintf(name, (size_t)length, "%s", cuda.info[device].name);
    return r;
}

API CUresult cuDeviceGetUuid_v2(uint8_t uuid[16], CUdevice device)
{
    CUresult r = device_ok(device);
    if (!r)
        memcpy(uuid, cuda.info[device].uuid, 16);
    return r;
}

API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device)
{
    CUresult r = device_ok(device);
    if (!r)
        *bytes = cuda.info[device].total_bytes;
    return r;
}

API CUresult cuDeviceGetPCIBusId(char *id, int length, CUdevice device)
{
    CUresult r = device_ok(device);
    if (!r)
        snprintf(id, (size_t)length, "0000:%02X:00.0", cuda.physical[device] + 1);
    return r;
}

API CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device)
{
    static const struct { int attribute, value; } known[] = {
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 0x7fffffff}, {6, 65535}, {7, 65535}, {8, 49152},
        {10, 32}, {12, 65536}, {13, 1980000}, {16, 132}, {34, 0}, {38, 50 << 20}, {39, 2048}, {41, 1},
        {50, 0}, {75, 9}, {76, 0}, {78, 1}, {81, 233472}, {83, 0}, {97, 232448}, {102, 1}, {103, 1},
        {104, 0}, {105, 0}, {106, 32}, {115, 1},
    };
    CUresult r = device_ok(device);
    if (r)
        return r;
    *value = attribute == 33 ? device + 1 : 0; /* PCI bus; what is not known is not supported: 0 */
    for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].attribute == attribute)
            *value = known[i].value;
    return CUDA_SUCCESS;
}

/* ---- contexts ---- */

uint32_t cuda_attach(void)
{
    struct uvm_initialize init = {0};
    struct fakenv_attach attach = {0};
    if (cuda.shared)
        return NV_OK;
    cuda.uvm_fd = open("/dev/nvidia-uvm", O_RDWR | O_CLOEXEC);
    if (cuda.uvm_fd < 0 || rm_ioctl(cuda.uvm_fd, UVM_INITIALIZE, &init) < 0 || init.status ||
        rm_ioctl(cuda.uvm_fd, _IOWR('F', FAKENV_ESC_ATTACH, struct fakenv_attach), &attach) < 0 || attach.status)
        return NV_ERR_INVALID_STATE;
    struct fakenv_shared *shared =
        mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, attach.shared_fd, 0);
    close(attach.shared_fd);
    if (shared == MAP_FAILED || engine_start(shared, attach.command_fd) < 0)
        return NV_ERR_NO_MEMORY;
    close(attach.command_fd); /* the engine has its own copy */
    cuda.shared = shared;
    return NV_OK;
}

static uint32_t channel_make(struct context *ctx, unsigned index, uint32_t group)
{
    uint8_t params[512] = {0};
    uint32_t status, token;
    struct uvm_register_channel known = {.ctl_fd = cuda.ctl_fd, .client = cuda.client};
    struct ring *ring = &ctx->ring[index];
    ((struct nv_channel_params *)(void *)params)->gpfifo_entries = FAKENV_RING;
    pthread_mutex_init(&ring->lock, NULL);
    if ((status = rm_alloc(group, HOPPER_CHANNEL_GPFIFO, params, cuda.branch->channel_params, &ring->handle)))
        return status;
    if ((status = rm_control(ring->handle, CTRL_GET_WORK_SUBMIT_TOKEN, &token, sizeof token)))
        return status;
    ring->slot = token;
    known.channel = ring->handle;
    memcpy(known.uuid, cuda.info[ctx->gpu].uuid, 16);
    if (token >= FAKENV_SLOTS || rm_ioctl(cuda.uvm_fd, UVM_REGISTER_CHANNEL, &known) < 0)
        return NV_ERR_INVALID_STATE;
    return known.status;
}

static uint32_t group_make(struct context *ctx, uint32_t engine, unsigned first, unsigned count, uint32_t *group)
{
    struct nv_tsg_params params = {.vaspace = ctx->vaspace, .engine = engine};
    uint8_t schedule[3] = {1};
    uint32_t share = 0, status = rm_alloc(ctx->device, KEPLER_CHANNEL_GROUP_A, &params, sizeof params, group);
    uint32_t share_params[3] = {ctx->vaspace};
    if (!status && engine == NV2080_ENGINE_GRAPHICS)
        status = rm_alloc(*group, FERMI_CONTEXT_SHARE_A, share_params, sizeof share_params, &share);
    for (unsigned i = 0; !status && i < count; i++)
        status = channel_make(ctx, first + i, *group);
    return status ? status : rm_control(*group, CTRL_TSG_SCHEDULE, schedule, cuda.branch->schedule_params);
}

static uint32_t context_build(struct context *ctx)
{
    uint32_t params[14] = {cuda.physical[ctx->gpu]}, none = 0, status;
    uint8_t vaspace[64] = {0};
    struct uvm_register_gpu gpu = {.ctl_fd = cuda.ctl_fd, .client = cuda.client};
    struct uvm_register_vaspace space = {.ctl_fd = cuda.ctl_fd, .client = cuda.client};
    memcpy(gpu.uuid, cuda.info[ctx->gpu].uuid, 16);
    memcpy(space.uuid, gpu.uuid, 16);
    if ((status = cuda_attach()) ||
        (status = rm_alloc(cuda.client, NV01_DEVICE_0, params, sizeof params, &ctx->device)) ||
        (status = rm_alloc(ctx->device, NV20_SUBDEVICE_0, &none, sizeof none, &ctx->subdevice)) ||
        (status = rm_alloc(ctx->device, FERMI_VASPACE_A, vaspace, cuda.branch->vaspace_params, &ctx->vaspace)))
        return status;
    rm_ioctl(cuda.uvm_fd, UVM_REGISTER_GPU, &gpu);
    space.vaspace = ctx->vaspace;
    rm_ioctl(cuda.uvm_fd, UVM_REGISTER_GPU_VASPACE, &space);
    if ((status = group_make(ctx, NV2080_ENGINE_GRAPHICS, 0, ctx->compute_channels, &ctx->gr_tsg)))
        return status;
    for (unsigned i = 0; !status && i < COPY_ENGINES; i++)
        status = group_make(ctx, NV2080_ENGINE_COPY0 + i, FAKENV_COMPUTE_MAX + i, 1, &ctx->ce_tsg[i]);
    return status;
}

static CUresult context_new(int gpu, struct context **out)
{
    static uint32_t next_device = 0xde000001; /* some handles are the client's choice: none that RM would give */
    struct context *ctx = calloc(1, sizeof *ctx);
    if (!ctx)
        return CUDA_ERROR_OUT_OF_MEMORY;
    struct fakenv_query now;
    if (rm_query(gpu, &now) != NV_OK) {
        free(ctx);
        return CUDA_ERROR_UNKNOWN;
    }
    ctx->gpu = gpu;
    ctx->refs = 1;
    ctx->compute_channels = now.compute_channels;
    ctx->device = next_device;
    next_device += 0x100;
    stream_init(&ctx->null_stream, ctx, 0);
    uint32_t status = context_build(ctx);
    if (status) {
        rm_free(ctx->device);
        free(ctx);
        return cuda_result(status);
    }
    *out = ctx;
    return CUDA_SUCCESS;
}

static void context_end(struct context *ctx)
{
    rm_free(ctx->device); /* and everything below it */
    free(ctx);
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext *ctx, CUdevice device)
{
    CUresult r = device_ok(device);
    if (r)
        return r;
    pthread_mutex_lock(&cuda_lock);
    if (cuda.primary[device])
        cuda.primary[device]->refs++;
    else
        r = context_new(device, &cuda.primary[device]);
    *ctx = cuda.primary[device];
    pthread_mutex_unlock(&cuda_lock);
    return r;
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
    CUresult r = device_ok(device);
    if (r)
        return r;
    pthread_mutex_lock(&cuda_lock);
    struct context *ctx = cuda.primary[device];
    if (!ctx)
        r = CUDA_ERROR_INVALID_CONTEXT;
    else if (--ctx->refs == 0) {
        cuda.primary[device] = NULL;
        context_end(ctx);
    }
    pthread_mutex_unlock(&cuda_lock);
    return r;
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active)
{
    CUresult r = device_ok(device);
    if (!r)
        *flags = 0, *active = cuda.primary[device] != NULL;
    return r;
}

API CUresult cuCtxPushCurrent_v2(CUcontext ctx)
{
    if (!ctx || depth == MAX_STACK)
        return CUDA_ERROR_INVALID_CONTEXT;
    stack[depth++] = ctx;
    return CUDA_SUCCESS;
}

API CUresult cuCtxPopCurrent_v2(CUcontext *ctx)
{
    if (!depth)
        return CUDA_ERROR_INVALID_CONTEXT;
    depth--;
    if (ctx)
        *ctx = stack[depth];
    return CUDA_SUCCESS;
}

API CUresult cuCtxSetCurrent(CUcontext ctx)
{
    if (depth)
        depth--;
    return ctx ? cuCtxPushCurrent_v2(ctx) : CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext *ctx)
{
    *ctx = depth ? stack[depth - 1] : NULL;
    return cuda_ready();
}

API CUresult cuCtxCreate_v2(CUcontext *ctx, unsigned flags, CUdevice device)
{
    CUresult r = device_ok(device);
    if (r)
        return r;
    pthread_mutex_lock(&cuda_lock);
    r = context_new(device, ctx);
    pthread_mutex_unlock(&cuda_lock);
    return r ? r : cuCtxPushCurrent_v2(*ctx);
}

API CUresult cuCtxCreate_v4(CUcontext *ctx, void *params, unsigned flags, CUdevice device)
{
    return params ? CUDA_ERROR_NOT_SUPPORTED : cuCtxCreate_v2(ctx, flags, device);
}

API CUresult cuCtxDestroy_v2(CUcontext ctx)
{
    if (!ctx)
        return CUDA_ERROR_INVALID_CONTEXT;
    if (depth && stack[depth - 1] == ctx)
        depth--;
    pthread_mutex_lock(&cuda_lock);
    context_end(ctx);
    pthread_mutex_unlock(&cuda_lock);
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice *device)
{
    struct context *ctx;
    CUresult r = cuda_current(&ctx);
    if (!r)
        *device = ctx->gpu;
    return r;
}

API CUresult cuCtxSynchronize(void)
{
    struct context *ctx;
    CUresult r = cuda_current(&ctx);
    return r ? r : context_wait(ctx);
}

API CUresult cuCtxGetApiVersion(CUcontext ctx, unsigned *version)
{
    *version = CUDA_VERSION;
    return cuda_ready();
}

API CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    if (least)
        *least = 0;
    if (greatest)
        *greatest = -5;
    return cuda_ready();
}
