/* SPDX-License-Identifier: Apache-2.0
 *
 * The control loop's part: it owns duplicates of the process's driver files, so that they
 * outlive what the process does to its descriptors and can be sent again to the next agent
 * while the process is stopped.  It disables channels at the agent's command (route
 * in-process) and when there is no agent (P6).  Raw system calls, static memory, no lock.
 */
#include "control.h"
#include "gpu.h"
#include "link.h"
#include "nv_abi.h"
#include "sys.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>

#define SEALS (0x0001 | 0x0002 | 0x0004) /* F_SEAL_SEAL, SHRINK, GROW */
#define ADD_SEALS 1033                   /* F_ADD_SEALS */
#define IOCTL_CONTROL _IOC(_IOC_READ | _IOC_WRITE, NV_IOCTL_TYPE, NV_ESC_CONTROL, sizeof(struct nv_control))

static struct {
    int table, bell; /* descriptors of the control loop; -1 until the agent is one of an nvidia device */
    int is_linked;
    int fds[VALVE_GPU_FILES_MAX]; /* descriptor + 1 */
    uint32_t kinds[VALVE_GPU_FILES_MAX];
    uint64_t answered;
} gpu = {.table = -1, .bell = -1};

void gpu_control_reset(void)
{
    __builtin_memset(&gpu, 0, sizeof gpu);
    gpu.table = gpu.bell = -1;
}

int gpu_pipe_fd(void) { return valve.gpu_control_end; }
int gpu_bell_fd(void) { return gpu.bell; }

static void set_state(uint32_t state)
{
    atomic_store(&valve.gpu_state, state);
}

static int make_table(void)
{
    int fd = (int)SYS2(SYS_memfd_create, "valve-gpu", 3 /* CLOEXEC, ALLOW_SEALING */);
    if (fd < 0)
        return fd;
    long result = SYS2(SYS_ftruncate, fd, sizeof *GPU_TABLE);
    if (result == 0)
        result = sys_fcntl(fd, ADD_SEALS, SEALS);
    if (result == 0) {
        const struct valve_gpu_table empty = {
            .magic = VALVE_MAGIC, .version = VALVE_VERSION_MAX,
            .hold = VALVE_GPU_HOLD_CHANNELS | VALVE_GPU_HOLD_LAUNCHES}; /* until the agent says otherwise */
        result = SYS4(SYS_pwrite64, fd, &empty, sizeof empty, 0) == sizeof empty ? 0 : -EIO;
    }
    if (result == 0)
        result = sys_mmap(GPU_TABLE, sizeof *GPU_TABLE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    int bell = result < 0 ? -1 : (int)SYS2(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (sys_failed(result) || bell < 0) {
        sys_close(fd);
        return -ENOMEM;
    }
    gpu.table = fd;
    gpu.bell = bell;
    return 0;
}

static void send_file(uint32_t number)
{
    struct valve_gpu_file frame = {.number = number, .kind = gpu.kinds[number]};
    int fd = gpu.fds[number] - 1;
    control_send(VALVE_GPU_FILE, &frame, sizeof frame, &fd, 1);
}

void gpu_linked(int is_nvidia)
{
    if (!is_nvidia) {
        set_state(GPU_UNCONTROLLED);
        return;
    }
    if (gpu.table < 0 && make_table() != 0) {
        VALVE_SAY("no memory for the table of GPU channels; this process gets no GPU channel");
        set_state(GPU_CONTROLLED); /* every channel waits for an agent that never takes its file */
        return;
    }
    set_state(GPU_CONTROLLED);
    struct valve_gpu_open frame = {.table_bytes = sizeof *GPU_TABLE};
    const int fds[2] = {gpu.table, gpu.bell};
    gpu.is_linked = 1;
    control_send(VALVE_GPU_TABLE, &frame, sizeof frame, fds, 2);
    for (uint32_t i = 0; i < VALVE_GPU_FILES_MAX && gpu.is_linked; i++)
        if (gpu.fds[i])
            send_file(i);
}

void gpu_unlinked(void)
{
    if (!gpu.is_linked)
        return;
    gpu.is_linked = 0;
    __atomic_store_n(&GPU_TABLE->hold, VALVE_GPU_HOLD_CHANNELS | VALVE_GPU_HOLD_LAUNCHES, __ATOMIC_SEQ_CST);
    __atomic_store_n(&GPU_TABLE->taken, 0, __ATOMIC_SEQ_CST);
}

static void drop_file(uint32_t number)
{
    if (gpu.fds[number])
        sys_close(gpu.fds[number] - 1);
    gpu.fds[number] = 0;
}

static void on_message(const struct gpu_message *message, int fd)
{
    uint32_t n = message->number;
    if (n >= VALVE_GPU_FILES_MAX)
        return;
    drop_file(n);
    if (message->is_gone) {
        struct valve_gpu_file frame = {.number = n, .kind = message->kind};
        if (gpu.is_linked)
            control_send(VALVE_GPU_FILE_GONE, &frame, sizeof frame, NULL, 0);
        return;
    }
    gpu.fds[n] = fd + 1;
    gpu.kinds[n] = message->kind;
    if (gpu.is_linked && fd >= 0)
        send_file(n);
}

void gpu_on_pipe(void)
{
    for (;;) {
        union {
            struct cmsghdr header;
            char bytes[CMSG_SPACE(sizeof(int))];
        } control;
        struct gpu_message message;
        struct iovec part = {&message, sizeof message};
        struct msghdr packet = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                                .msg_controllen = sizeof control};
        long got = SYS3(SYS_recvmsg, valve.gpu_control_end, &packet, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (got == -EAGAIN || got == -EINTR)
            return;
        if (got <= 0) { /* the process has closed its end */
            sys_close(valve.gpu_control_end);
            valve.gpu_control_end = -1;
            return;
        }
        int fd = -1;
        if (packet.msg_controllen >= sizeof(struct cmsghdr) && control.header.cmsg_type == SCM_RIGHTS)
            __builtin_memcpy(&fd, CMSG_DATA(&control.header), sizeof fd);
        if (got == (long)sizeof message)
            on_message(&message, fd);
    }
}

static int is_wanted(const struct valve_gpu_channel *slot, int all)
{
    int is_compute = slot->engine >= NV_ENGINE_GRAPHICS_FIRST && slot->engine <= NV_ENGINE_GRAPHICS_LAST;
    return __atomic_load_n(&slot->state, __ATOMIC_SEQ_CST) && slot->file < VALVE_GPU_FILES_MAX && (all || is_compute);
}

/* Disable or enable every channel that shares file, client and subdevice with slot `first`. */
static uint32_t set_batch(uint32_t first, uint32_t slots, int all, uint8_t disable, unsigned char *done)
{
    static struct nv_disable params; /* the control loop is one thread */
    const struct valve_gpu_channel *lead = &GPU_TABLE->channels[first];
    struct nv_control call = {.client = lead->client, .object = lead->subdevice, .command = NV_DISABLE_CHANNELS,
                              .params = (uintptr_t)&params, .params_size = sizeof params};
    uint32_t file = lead->file;
    __builtin_memset(&params, 0, sizeof params);
    params.disable = disable;
    for (uint32_t i = first; i < slots && params.count < NV_CHANNELS_PER_CALL; i++) {
        const struct valve_gpu_channel *slot = &GPU_TABLE->channels[i];
        if (done[i] || !is_wanted(slot, all) || slot->file != file || slot->client != call.client ||
            slot->subdevice != call.object)
            continue;
        params.client[params.count] = call.client;
        params.channel[params.count++] = slot->channel;
        done[i] = 1;
    }
    if (params.count == 0 || file >= VALVE_GPU_FILES_MAX || gpu.fds[file] == 0)
        return params.count == 0 ? NV_OK : NV_ERR_INSUFFICIENT_PERMISSIONS;
    long result = SYS3(SYS_ioctl, gpu.fds[file] - 1, IOCTL_CONTROL, &call);
    return result < 0 ? (uint32_t)(0x10000 - result) : call.status;
}

/* The worst status of all batches. */
static uint32_t set_channels(int all, uint8_t disable)
{
    static unsigned char done[VALVE_GPU_CHANNELS_MAX];
    uint32_t slots = __atomic_load_n(&GPU_TABLE->slots, __ATOMIC_SEQ_CST), worst = NV_OK;
    if (slots > VALVE_GPU_CHANNELS_MAX)
        slots = VALVE_GPU_CHANNELS_MAX;
    __builtin_memset(done, 0, sizeof done);
    for (uint32_t i = 0; i < slots; i++) {
        if (done[i] || !is_wanted(&GPU_TABLE->channels[i], all))
            continue;
        uint32_t status = set_batch(i, slots, all, disable, done);
        worst = status ? status : worst;
    }
    return worst;
}

void gpu_on_bell(void)
{
    uint64_t rings, command;
    if (SYS3(SYS_read, gpu.bell, &rings, sizeof rings) != sizeof rings)
        return;
    command = __atomic_load_n(&GPU_TABLE->command, __ATOMIC_SEQ_CST);
    int is_mine = __atomic_load_n(&GPU_TABLE->route, __ATOMIC_SEQ_CST) == VALVE_ROUTE_IN_PROCESS;
    if (!gpu.is_linked || !is_mine || command == gpu.answered)
        return;
    uint32_t verb = command & 3, status = NV_OK;
    if (verb == VALVE_GPU_RUN)
        status = set_channels(1, 0);
    else if (verb == VALVE_GPU_STOP_COMPUTE || verb == VALVE_GPU_STOP_ALL)
        status = set_channels(verb == VALVE_GPU_STOP_ALL, 1);
    gpu.answered = command;
    GPU_TABLE->answer = status;
    __atomic_store_n(&GPU_TABLE->answered, command, __ATOMIC_SEQ_CST);
}

void gpu_stop_all(void)
{
    char number[24];
    if (gpu.table < 0)
        return;
    uint32_t status = set_channels(1, 1);
    if (status != NV_OK)
        VALVE_SAY("the driver does not disable this offline process's channels (status ",
                  valve_decimal(status, number), "); what it has launched runs to its end");
}
