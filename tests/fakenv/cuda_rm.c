/* SPDX-License-Identifier: Apache-2.0
 *
 * RM and UVM calls. Deliberately as varied as a real libcuda's: short and long forms of RM_ALLOC,
 * some through the transfer escape, some handles chosen here and some by the driver, so that an
 * interposer that misses one form is found out.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "cuda_fake.h"

struct cuda cuda = {.ctl_fd = -1, .uvm_fd = -1};
pthread_mutex_t cuda_lock = PTHREAD_MUTEX_INITIALIZER;

CUresult cuda_result(uint32_t status)
{
    switch (status) {
    case NV_OK: return CUDA_SUCCESS;
    case NV_ERR_NO_MEMORY: return CUDA_ERROR_OUT_OF_MEMORY;
    case NV_ERR_INVALID_ADDRESS:
    case NV_ERR_INVALID_OFFSET:
    case NV_ERR_INVALID_ARGUMENT: return CUDA_ERROR_INVALID_VALUE;
    case NV_ERR_GPU_IS_LOST: return CUDA_ERROR_UNKNOWN;
    default: return CUDA_ERROR_OPERATING_SYSTEM;
    }
}

int rm_ioctl(int fd, unsigned long command, void *params)
{
    int r;
    do
        r = ioctl(fd, command, params);
    while (r < 0 && errno == EINTR);
    return r;
}

uint32_t rm_query(int gpu, struct fakenv_query *query)
{
    memset(query, 0, sizeof *query);
    query->gpu = cuda.physical[gpu];
    if (rm_ioctl(cuda.ctl_fd, _IOWR('F', FAKENV_ESC_QUERY, struct fakenv_query), query) < 0)
        return NV_ERR_INVALID_STATE;
    return query->status;
}

/* The number, among those that this process has, of a GPU that CUDA_VISIBLE_DEVICES names by number or by the beginning of its UUID. */
static int named(const char *word, unsigned gpus)
{
    char *end;
    unsigned long number = strtoul(word, &end, 10);
    if (end != word && !*end)
        return number < gpus ? (int)number : -1;
    for (unsigned i = 0; i < gpus; i++) {
        char name[64] = "GPU-";
        const uint8_t *u = cuda.info[i].uuid;
        for (unsigned b = 0, n = 4; b < 16; b++) {
            n += (unsigned)snprintf(name + n, sizeof name - n, "%02x", u[b]);
            if (b == 3 || b == 5 || b == 7 || b == 9)
                name[n++] = '-';
        }
        if (strlen(word) > 4 && !strncmp(word, name, strlen(word)))
            return (int)i;
    }
    return -1;
}

/* What CUDA_VISIBLE_DEVICES leaves, in its order, up to the first word that names nothing. */
static void choose_visible(void)
{
    const char *names = getenv("CUDA_VISIBLE_DEVICES");
    unsigned gpus = cuda.gpus, chosen[FAKENV_MAX_GPUS];
    char copy[1024], *rest = copy, *word;
    if (!names)
        return;
    snprintf(copy, sizeof copy, "%s", names);
    cuda.gpus = 0;
    while (cuda.gpus < gpus && (word = strsep(&rest, ","))) {
        int gpu = named(word, gpus);
        if (gpu < 0)
            break;
        chosen[cuda.gpus++] = cuda.physical[gpu];
    }
    memcpy(cuda.physical, chosen, cuda.gpus * sizeof *chosen);
}

uint32_t rm_connect(void)
{
    struct nv_version version = {.cmd = '2'};
    struct nvos21 root = {.hclass = NV01_ROOT_CLIENT};
    cuda.ctl_fd = open("/dev/nvidiactl", O_RDWR | O_CLOEXEC);
    if (cuda.ctl_fd < 0)
        return NV_ERR_INVALID_DEVICE;
    if (rm_ioctl(cuda.ctl_fd, _IOWR('F', NV_ESC_CHECK_VERSION_STR, struct nv_version), &version) < 0 ||
        rm_query(0, &cuda.info[0]) != NV_OK)
        return NV_ERR_INVALID_STATE;
    cuda.branch = branch_named(cuda.info[0].branch);
    char path[32];
    unsigned gpus = cuda.info[0].gpus;
    for (unsigned i = 0; i < gpus; i++) {
        snprintf(path, sizeof path, "/dev/nvidia%u", i);
        if (access(path, F_OK) < 0) /* not this container's */
            continue;
        cuda.physical[cuda.gpus] = i;
        rm_query((int)cuda.gpus, &cuda.info[cuda.gpus]);
        cuda.gpus++;
    }
    choose_visible();
    for (unsigned i = 0; i < cuda.gpus; i++) {
        rm_query((int)i, &cuda.info[i]);
        snprintf(path, sizeof path, "/dev/nvidia%u", cuda.physical[i]);
        cuda.gpu_fd[i] = open(path, O_RDWR | O_CLOEXEC);
        if (cuda.gpu_fd[i] < 0 ||
            rm_ioctl(cuda.gpu_fd[i], _IOWR('F', NV_ESC_REGISTER_FD, int), &cuda.ctl_fd) < 0)
            return NV_ERR_INVALID_DEVICE;
    }
    if (rm_ioctl(cuda.ctl_fd, _IOWR('F', NV_ESC_RM_ALLOC, struct nvos21), &root) < 0)
        return NV_ERR_INVALID_STATE;
    cuda.client = root.object;
    return root.status;
}

/* Channels: long form through the transfer escape. Groups: long form. The rest: short form. */
uint32_t rm_alloc(uint32_t parent, uint32_t hclass, void *params, uint32_t size, uint32_t *handle)
{
    bool channel = hclass == HOPPER_CHANNEL_GPFIFO, wide = channel || hclass == KEPLER_CHANNEL_GROUP_A;
    struct nvos64 p = {.root = cuda.client, .parent = parent, .object = *handle, .hclass = hclass,
                       .params = (uintptr_t)params, .params_size = size};
    int r;
    if (!wide) {
        struct nvos21 small = {p.root, p.parent, p.object, p.hclass, p.params, size, 0};
        r = rm_ioctl(cuda.ctl_fd, _IOWR('F', NV_ESC_RM_ALLOC, struct nvos21), &small);
        p.object = small.object, p.status = small.status;
    } else if (channel) {
        struct nv_xfer xfer = {NV_ESC_RM_ALLOC, sizeof p, (uintptr_t)&p};
        r = rm_ioctl(cuda.ctl_fd, _IOWR('F', NV_ESC_IOCTL_XFER_CMD, struct nv_xfer), &xfer);
    } else {
        r = rm_ioctl(cuda.ctl_fd, _IOWR('F', NV_ESC_RM_ALLOC, struct nvos64), &p);
    }
    *handle = p.object;
    return r < 0 ? (uint32_t)NV_ERR_INVALID_STATE : p.status;
}

uint32_t rm_control(uint32_t object, uint32_t cmd, void *params, uint32_t size)
{
    struct nvos54 p = {cuda.client, object, cmd, 0, (uintptr_t)params, size, 0};
    return rm_ioctl(cuda.ctl_fd, _IOWR('F', NV_ESC_RM_CONTROL, struct nvos54), &p) < 0
               ? (uint32_t)NV_ERR_INVALID_STATE : p.status;
}

void rm_free(uint32_t object)
{
    struct nvos00 p = {cuda.client, 0, object, 0};
    rm_ioctl(cuda.ctl_fd, _IOWR('F', NV_ESC_RM_FREE, struct nvos00), &p);
}

uint32_t rm_memory(uint32_t device, uint64_t bytes, uint32_t *handle)
{
    uint8_t params[128] = {0};
    memcpy(params + NV_MEMORY_SIZE_OFFSET, &bytes, sizeof bytes);
    *handle = 0;
    return rm_alloc(device, NV01_MEMORY_LOCAL_USER, params, cuda.branch->memory_params, handle);
}

uint32_t uvm_map(int gpu, uint64_t base, uint64_t length, uint64_t offset, uint32_t memory)
{
    size_t attributes = cuda.branch->uvm_max_gpus * sizeof(struct uvm_gpu_attributes);
    uint8_t *p = calloc(1, sizeof(struct uvm_map_head) + attributes + sizeof(struct uvm_map_tail));
    if (!p)
        return NV_ERR_NO_MEMORY;
    struct uvm_map_tail *tail = (void *)(p + sizeof(struct uvm_map_head) + attributes);
    *(struct uvm_map_head *)(void *)p = (struct uvm_map_head){base, length, offset};
    memcpy(p + sizeof(struct uvm_map_head), cuda.info[gpu].uuid, 16);
    *tail = (struct uvm_map_tail){.count = 1, .ctl_fd = cuda.ctl_fd, .client = cuda.client, .memory = memory};
    uint32_t status = rm_ioctl(cuda.uvm_fd, UVM_MAP_EXTERNAL_ALLOCATION, p) < 0 ? NV_ERR_INVALID_STATE : tail->status;
    free(p);
    return status;
}

uint32_t uvm_call(int gpu, unsigned long command, uint64_t base, uint64_t length)
{
    struct uvm_gpu_range gpu_range = {.base = base, .length = length};
    struct uvm_range range = {base, length, 0, 0};
    struct uvm_free one = {base, 0, 0};
    void *p = command == UVM_CREATE_EXTERNAL_RANGE ? (void *)&range : command == UVM_FREE ? (void *)&one : &gpu_range;
    memcpy(gpu_range.uuid, cuda.info[gpu].uuid, 16);
    if (rm_ioctl(cuda.uvm_fd, command, p) < 0)
        return NV_ERR_INVALID_STATE;
    return p == &range ? range.status : p == &one ? one.status : gpu_range.status;
}
