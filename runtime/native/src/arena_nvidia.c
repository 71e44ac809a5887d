/* SPDX-License-Identifier: Apache-2.0
 *
 * The arena on a GPU: address space that the engine's thread reserves in its CUDA context, every
 * slab of it mapped to a quarantine allocation from the first moment.  What lies there later is
 * the agent's to change: through this process's UVM file (route BY_AGENT, nothing of it runs here),
 * or by asking the memory thread below, which calls libcuda (route BY_TENANT).
 *
 * Threads: valve_nvidia_open runs in the engine's thread and may block and allocate.  The memory
 * thread owns its socket.  The control loop takes no part: libcuda is not for it.
 */
#include "arena_nvidia.h"
#include "cuda_api.h"
#include "frame.h"
#include "link.h"
#include "state.h"

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct {
    const struct cuda_api *cuda;
    void *context;
    int device;
    cuda_address base;
    uint64_t slab_bytes, slabs;
    cuda_handle quarantine;
    int sock;
} memory = {.sock = -1};

static cuda_address slab_at(uint64_t slab) { return memory.base + slab * memory.slab_bytes; }

static int failed(const char *call, cuda_result result)
{
    char number[24];
    if (result != 0)
        VALVE_SET_ERROR("the GPU driver refuses ", call, " with CUDA error ",
                        valve_decimal((uint64_t)result, number), " (see cuGetErrorName)");
    return result != 0;
}

/* ---- the memory connection: one frame out, one frame in ---- */

static void close_all(int fds[VALVE_MEMORY_BATCH])
{
    for (unsigned i = 0; i < VALVE_MEMORY_BATCH; i++) {
        if (fds[i] >= 0)
            close(fds[i]);
        fds[i] = -1;
    }
}

/* The next frame, or 0 after saying why there is none.  `fd`: its descriptors, and -1 for the rest. */
static int receive(void *frame, size_t room, int fd[VALVE_MEMORY_BATCH])
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int) * VALVE_MEMORY_BATCH)];
    } control;
    struct iovec part = {frame, room};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
        /* Exactly that many: CMSG_SPACE is rounded up to room for one more.  The kernel closes the rest. */
        .msg_controllen = CMSG_LEN(sizeof(int) * VALVE_MEMORY_BATCH)};
    for (unsigned i = 0; i < VALVE_MEMORY_BATCH; i++)
        fd[i] = -1;
    ssize_t got;
    do
        got = recvmsg(memory.sock, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    struct cmsghdr *rights = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(rights), rights->cmsg_len - CMSG_LEN(0));
    const struct valve_header *header = frame;
    if (got < (ssize_t)sizeof *header || header->magic != VALVE_MAGIC || header->size != (size_t)got) {
        VALVE_SET_ERROR("the agent does not answer about GPU memory; see its log");
        close_all(fd);
        return 0;
    }
    if (header->type == VALVE_DENIED || header->type == VALVE_REJECT) {
        const struct valve_reject *refusal = frame;
        char text[VALVE_TEXT_BYTES];
        valve_copy_text(text, sizeof text, (size_t)got == sizeof *refusal ? refusal->text : "no reason");
        VALVE_SET_ERROR(text);
        close_all(fd);
        return 0;
    }
    return header->type;
}

static int send_frame(int type, void *frame, size_t size, const int *fds, int count)
{
    return link_send(memory.sock, type, frame, size, fds, count) == 0;
}

static int connect_agent(uint64_t timeout_ns)
{
    struct timeval limit = {(time_t)(timeout_ns / 1000000000u) + 1, 0};
    memory.sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (memory.sock < 0)
        return 0;
    memory.sock = link_move_high(memory.sock);
    setsockopt(memory.sock, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(memory.sock, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit); /* connect waits by this one */
    return connect(memory.sock, (const struct sockaddr *)&valve.address, sizeof valve.address) == 0;
}

/* ---- mapping through libcuda ---- */

static int map_one(uint64_t slab, cuda_handle handle)
{
    return failed("cuMemMap", memory.cuda->map(slab_at(slab), memory.slab_bytes, 0, handle, 0));
}

static int allow(uint64_t slab, uint64_t count)
{
    struct cuda_access access = {{1, memory.device}, 3};
    return failed("cuMemSetAccess", memory.cuda->set_access(slab_at(slab), count * memory.slab_bytes, &access, 1));
}

static int reserve_on_quarantine(int quarantine_fd)
{
    const struct cuda_api *cuda = memory.cuda;
    uint64_t bytes = memory.slabs * memory.slab_bytes;
    if (failed("cuMemAddressReserve", cuda->reserve(&memory.base, bytes, 0, 0, 0)))
        return -1;
    if (failed("cuMemImportFromShareableHandle",
               cuda->import(&memory.quarantine, (void *)(intptr_t)quarantine_fd, CUDA_POSIX_FD)))
        return -1;
    for (uint64_t i = 0; i < memory.slabs; i++)
        if (map_one(i, memory.quarantine))
            return -1;
    return allow(0, memory.slabs) ? -1 : 0;
}

/* Every open UVM file of this process: libcuda has one with our address space, and others. */
static int find_uvm(int fds[VALVE_MEMORY_BATCH])
{
    char path[64], target[64];
    int count = 0;
    DIR *folder = opendir("/proc/self/fd");
    for (struct dirent *entry; folder && count < (int)VALVE_MEMORY_BATCH && (entry = readdir(folder));) {
        if (entry->d_name[0] == '.')
            continue;
        valve_copy_text(path, sizeof path, "/proc/self/fd/");
        valve_copy_text(path + strlen(path), sizeof path - strlen(path), entry->d_name);
        ssize_t length = readlink(path, target, sizeof target - 1);
        target[length < 0 ? 0 : length] = 0;
        if (strcmp(target, "/dev/nvidia-uvm") == 0)
            fds[count++] = atoi(entry->d_name);
    }
    if (folder)
        closedir(folder);
    return count;
}

/* ---- route BY_TENANT: the memory thread ---- */

static uint32_t remap(const struct valve_memory_map *frame, const int *fds)
{
    const struct cuda_api *cuda = memory.cuda;
    for (uint32_t i = 0; i < frame->count && i < VALVE_MEMORY_BATCH; i++) {
        cuda_handle handle;
        cuda_result result = frame->slab[i] < memory.slabs
                                 ? cuda->import(&handle, (void *)(intptr_t)fds[i], CUDA_POSIX_FD) : 1;
        if (result != 0)
            return (uint32_t)result;
        result = cuda->unmap(slab_at(frame->slab[i]), memory.slab_bytes);
        if (result != 0 || map_one(frame->slab[i], handle) || allow(frame->slab[i], 1))
            return result ? (uint32_t)result : 1;
        cuda->release(handle); /* the mapping keeps it */
    }
    return 0;
}

static uint32_t quarantine(const struct valve_memory_quarantine *frame)
{
    uint32_t past, end = (uint32_t)memory.slabs, first = valve_bitmap_run(&frame->set, 0, end, &past);
    for (; first < end; first = valve_bitmap_run(&frame->set, past, end, &past)) {
        cuda_result result = memory.cuda->unmap(slab_at(first), (past - first) * memory.slab_bytes);
        for (uint32_t i = first; i < past && result == 0; i++)
            result = map_one(i, memory.quarantine);
        if (result != 0 || allow(first, past - first))
            return result ? (uint32_t)result : 1;
    }
    return 0;
}

static void *memory_thread(void *nothing)
{
    union {
        struct valve_header header;
        struct valve_memory_map map;
        struct valve_memory_quarantine quarantine;
        unsigned char room[VALVE_FRAME_MAX];
    } frame;
    int fds[VALVE_MEMORY_BATCH];
    pthread_setname_np(pthread_self(), "valve-memory");
    memory.cuda->set_context(memory.context);
    for (int type; (type = receive(&frame, sizeof frame, fds)) != 0;) {
        struct valve_memory_done done = {.id = frame.map.id};
        if (type == VALVE_MEMORY_MAP)
            done.result = remap(&frame.map, fds);
        else if (type == VALVE_MEMORY_QUARANTINE)
            done.result = quarantine(&frame.quarantine);
        close_all(fds);
        if (!send_frame(VALVE_MEMORY_DONE, &done, sizeof done, NULL, 0))
            break;
    }
    close(memory.sock); /* the agent takes this process for lost */
    return nothing;
}

static int serve_remaps(void)
{
    struct timeval forever = {0, 0};
    setsockopt(memory.sock, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);
    return valve_start_thread(memory_thread) == 0 ? 0 : -1;
}

/* ---- opening ---- */

static int use_context(uint8_t gpu[16])
{
    const struct cuda_api *cuda = memory.cuda = cuda_api();
    if (cuda == NULL) {
        VALVE_SET_ERROR("no libcuda.so.1 that knows virtual memory management in this process: is it a GPU "
                        "container with driver 535 or later?");
        return -1;
    }
    cuda->context(&memory.context);
    if (memory.context == NULL) {
        if (failed("cuInit", cuda->init(0)) || failed("a context", cuda->retain_primary(&memory.context, 0)) ||
            failed("cuCtxSetCurrent", cuda->set_context(memory.context)))
            return -1;
    }
    return failed("cuCtxGetDevice", cuda->context_device(&memory.device)) ||
                   failed("cuDeviceGetUuid", cuda->uuid(gpu, memory.device)) ? -1 : 0;
}

static int ask(uint64_t bytes, const uint8_t gpu[16], int *quarantine_fd)
{
    struct valve_memory_open question = {.slabs = bytes / valve.slab_bytes_told + (bytes % valve.slab_bytes_told != 0)};
    _Alignas(8) unsigned char room[VALVE_FRAME_MAX];
    const struct valve_memory *answer = (const void *)room;
    int fds[VALVE_MEMORY_BATCH];
    if (bytes == 0)
        question.slabs = valve.slabs_limit;
    memcpy(question.gpu, gpu, sizeof question.gpu);
    if (!send_frame(VALVE_MEMORY_OPEN, &question, sizeof question, NULL, 0))
        return -1;
    int type = receive(room, sizeof room, fds);
    *quarantine_fd = fds[0];
    fds[0] = -1;
    close_all(fds);
    if (type != VALVE_MEMORY || *quarantine_fd < 0)
        return -1;
    memory.slabs = answer->slabs;
    memory.slab_bytes = answer->slab_bytes;
    return memory.slabs == 0 || memory.slabs > VALVE_SLABS_MAX || memory.slab_bytes == 0 ? -1 : 0;
}

/* The agent has paused us and asks for a remap, to see whether libcuda remaps with work in flight that
 * cannot end.  So there must be some: a fill of what is remapped, which runs when we do. */
static int answer_probe(const struct valve_memory_quarantine *probe)
{
    struct valve_memory_done done = {.id = probe->id};
    memory.cuda->fill(memory.base, 0, memory.slab_bytes, NULL);
    done.result = quarantine(probe);
    return send_frame(VALVE_MEMORY_DONE, &done, sizeof done, NULL, 0);
}

static int announce(void)
{
    struct valve_memory_mapped mapped = {.base = memory.base, .slabs = memory.slabs};
    _Alignas(8) unsigned char room[VALVE_FRAME_MAX];
    int uvm[VALVE_MEMORY_BATCH], fds[VALVE_MEMORY_BATCH];
    int count = find_uvm(uvm);
    if (count == 0) {
        VALVE_SET_ERROR("this process has no open /dev/nvidia-uvm: is the nvidia-uvm module loaded, and the "
                        "device file in the container?");
        return -1;
    }
    if (!send_frame(VALVE_MEMORY_MAPPED, &mapped, sizeof mapped, uvm, count))
        return -1;
    int type = receive(room, sizeof room, fds);
    close_all(fds);
    if (type == VALVE_MEMORY_QUARANTINE && answer_probe((const void *)room)) {
        type = receive(room, sizeof room, fds);
        close_all(fds);
    }
    if (type != VALVE_MEMORY_READY)
        return -1;
    if (((const struct valve_memory_ready *)(void *)room)->route == VALVE_MEMORY_BY_TENANT)
        return serve_remaps();
    memory.cuda->release(memory.quarantine); /* the mappings keep it */
    close(memory.sock);
    memory.sock = -1;
    return 0;
}

uint64_t valve_nvidia_base(void) { return memory.base; }

int valve_nvidia_open(uint64_t bytes, uint64_t timeout_ns)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    uint8_t gpu[16];
    int quarantine_fd = -1, result = -1;
    pthread_mutex_lock(&lock);
    if (memory.base != 0) {
        result = 0;
    } else if (use_context(gpu) == 0) {
        if (!connect_agent(timeout_ns))
            VALVE_SET_ERROR("no agent answers at ", valve.address.sun_path);
        else if (ask(bytes, gpu, &quarantine_fd) == 0 && reserve_on_quarantine(quarantine_fd) == 0)
            result = announce();
        if (quarantine_fd >= 0)
            close(quarantine_fd);
        if (result != 0) {
            if (memory.sock >= 0)
                close(memory.sock);
            memory.sock = -1;
            memory.base = 0; /* what was reserved stays reserved: nobody was told of it */
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}
