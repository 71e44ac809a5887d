/* SPDX-License-Identifier: Apache-2.0
 *
 * The functions of libc that libvalve stands in front of, to see what an offline process does
 * with the NVIDIA driver.  They run in the process's own threads.  In any other process, and
 * for any other file, they only pass on.
 *
 * A channel is made in this order: the agent has the file of its client; no hold is in force;
 * the driver makes it; it is in the table; no hold is in force.  The last step closes the race
 * with a pause that read the table just before: the thread that could use the channel does not
 * return before the pause is over.
 */
#include "gpu.h"
#include "nv_abi.h"
#include "sys.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define HIDDEN_WAIT_NS (20 * VALVE_NS_PER_MS)

/* The next definition in line: libc's, or another preloaded library's.  All are looked up before the
 * program's own code runs: a look-up takes the dynamic loader's lock, and a constructor may wait, under
 * that lock, for a thread that calls one of these for the first time. */
#define HOOKED(each)                                                                                        \
    each(ioctl) each(open) each(open64) each(openat) each(openat64) each(close) each(close_range)           \
    each(closefrom) each(dup) each(dup2) each(dup3) each(fcntl) each(fcntl64)
int fcntl64(int, int, ...); /* of a newer glibc than the one that we may be built with */
int close_range(unsigned, unsigned, int);
void closefrom(int);
#define DECLARE(name) static __typeof__(&name) real_##name;
HOOKED(DECLARE)

#define LOOK_UP(name) \
    __atomic_store_n(&real_##name, (__typeof__(&name))gpu_real_dlsym(RTLD_NEXT, #name), __ATOMIC_RELAXED);
void gpu_look_up(void) { HOOKED(LOOK_UP) }

/* Constructors of other libraries may come before ours. */
#define NEXT(name)                                                              \
    __typeof__(&name) next = __atomic_load_n(&real_##name, __ATOMIC_RELAXED);   \
    if (__builtin_expect(next == NULL, 0)) {                                    \
        LOOK_UP(name)                                                           \
        next = __atomic_load_n(&real_##name, __ATOMIC_RELAXED);                 \
    }

static int active;

int gpu_on(void) { return active && atomic_load(&valve.gpu_state) != GPU_UNCONTROLLED; }

void gpu_start(void) { active = 1; }

void gpu_wait_while_held(uint32_t bits)
{
    for (;;) {
        uint32_t hold = __atomic_load_n(&GPU_TABLE->hold, __ATOMIC_SEQ_CST);
        if (!(hold & bits))
            return;
        sys_futex_wait_shared(&GPU_TABLE->hold, hold, 100 * VALVE_NS_PER_MS);
    }
}

/* Until the agent controls what is made on this file. */
static int file_is_taken(int fd, int number)
{
    if (gpu_file_hand_over(fd, number) != 0)
        return 0;
    for (;;) {
        uint32_t taken = __atomic_load_n(&GPU_TABLE->taken, __ATOMIC_SEQ_CST);
        if (taken >> number & 1)
            return 1;
        sys_futex_wait_shared(&GPU_TABLE->taken, taken, HIDDEN_WAIT_NS);
    }
}

static uint32_t word_at(uint64_t params, uint32_t size, uint32_t offset)
{
    uint32_t word = 0;
    if (params && (size == 0 || size >= offset + sizeof word))
        memcpy(&word, (const char *)(uintptr_t)params + offset, sizeof word);
    return word;
}

/* Results: what the real ioctl returned, with errno as it left it. */
typedef int call(int fd, unsigned long request, void *argument);

static int on_alloc(call *next, int fd, unsigned long request, void *argument, void *body, uint32_t size)
{
    int is_wide = size == sizeof(struct nv_alloc_wide), number = gpu_file_of(fd);
    struct nv_alloc *short_form = body;
    struct nv_alloc_wide *wide = body;
    if (number < 0 || (!is_wide && size != sizeof *short_form))
        return next(fd, request, argument);
    int is_channel = nv_is_channel(short_form->hclass);
    if (is_channel) {
        if (!file_is_taken(fd, number)) {
            *(is_wide ? &wide->status : &short_form->status) = NV_ERR_INSUFFICIENT_PERMISSIONS;
            VALVE_SAY("this offline process gets no GPU channel: ", valve_last_error());
            return 0;
        }
        gpu_wait_while_held(VALVE_GPU_HOLD_CHANNELS);
    }
    int result = next(fd, request, argument);
    uint32_t status = is_wide ? wide->status : short_form->status;
    if (result != 0 || status != NV_OK)
        return result;
    uint32_t hclass = short_form->hclass, params_size = is_wide ? wide->params_size : short_form->params_size;
    int is_root = hclass == NV_ROOT || hclass == NV_ROOT_NON_PRIV || hclass == NV_ROOT_CLIENT;
    if (!is_root && !is_channel && hclass != NV_DEVICE && hclass != NV_SUBDEVICE && hclass != NV_CHANNEL_GROUP)
        return result;
    uint32_t at = is_channel ? NV_CHANNEL_ENGINE : NV_GROUP_ENGINE;
    gpu_object_added(&(struct gpu_new){
        .client = is_root ? short_form->object : short_form->root,
        .parent = is_root ? 0 : short_form->parent,
        .object = short_form->object, /* chosen by the driver when it was 0 */
        .hclass = hclass,
        .engine = is_channel || hclass == NV_CHANNEL_GROUP ? word_at(short_form->params, params_size, at) : 0,
        .file = number,
    });
    if (is_channel) {
        int saved = errno;
        gpu_wait_while_held(VALVE_GPU_HOLD_CHANNELS);
        errno = saved;
    }
    return result;
}

static int on_free(call *next, int fd, unsigned long request, void *argument, struct nv_free *body)
{
    uint32_t token = gpu_object_freeing(body->root, body->object);
    int result = next(fd, request, argument);
    int saved = errno;
    gpu_object_freed(token, result == 0 && body->status == NV_OK);
    errno = saved;
    return result;
}

/* What could set channels going again waits for the end of a pause. */
static int on_control(call *next, int fd, unsigned long request, void *argument, const struct nv_control *body)
{
    if (body->command != NV_GROUP_SCHEDULE && body->command != NV_CHANNEL_SCHEDULE &&
        body->command != NV_DISABLE_CHANNELS)
        return next(fd, request, argument);
    gpu_wait_while_held(VALVE_GPU_HOLD_CHANNELS);
    int result = next(fd, request, argument);
    if (__atomic_load_n(&GPU_TABLE->hold, __ATOMIC_SEQ_CST))
        gpu_table_touched(); /* a pause came in between: the agent must say it again */
    return result;
}

static int on_driver_call(call *next, int fd, unsigned long request, void *argument)
{
    uint32_t number = _IOC_NR(request), size = _IOC_SIZE(request);
    void *body = argument;
    if (number == NV_ESC_XFER && size == sizeof(struct nv_xfer)) {
        const struct nv_xfer *wrapped = argument;
        number = wrapped->number;
        size = wrapped->size;
        body = (void *)(uintptr_t)wrapped->params;
    }
    if (body == NULL)
        return next(fd, request, argument);
    if (number == NV_ESC_ALLOC)
        return on_alloc(next, fd, request, argument, body, size);
    if (number == NV_ESC_FREE && size == sizeof(struct nv_free) && gpu_file_of(fd) >= 0)
        return on_free(next, fd, request, argument, body);
    if (number == NV_ESC_CONTROL && size == sizeof(struct nv_control) && gpu_file_of(fd) >= 0)
        return on_control(next, fd, request, argument, body);
    int result = next(fd, request, argument);
    if (number == NV_ESC_DUP_OBJECT && size == sizeof(struct nv_dup) && result == 0) {
        const struct nv_dup *dup = body;
        int file = gpu_file_of(fd);
        if (file >= 0 && dup->status == NV_OK)
            gpu_object_dupped(dup->client, dup->parent, dup->object, dup->source_client, dup->source, file);
    }
    return result;
}

static int next_ioctl(int fd, unsigned long request, void *argument)
{
    NEXT(ioctl);
    return next(fd, request, argument);
}

VALVE_API int ioctl(int fd, unsigned long request, ...)
{
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (!gpu_on())
        return next_ioctl(fd, request, argument);
    if (_IOC_TYPE(request) == NV_IOCTL_TYPE && _IOC_DIR(request) == (_IOC_READ | _IOC_WRITE) && argument)
        return on_driver_call(next_ioctl, fd, request, argument);
    int result = next_ioctl(fd, request, argument);
    if ((uint32_t)request == UVM_INITIALIZE && result == 0) {
        int saved = errno, number = gpu_file_of(fd);
        if (number >= 0) /* if it cannot be handed over, memory is reclaimed through libcuda or not at all */
            (void)gpu_file_hand_over(fd, number);
        errno = saved;
    }
    return result;
}

/* -- files ------------------------------------------------------------------------------ */

#define MODE_OF(last, flags)                             \
    va_list list;                                        \
    va_start(list, last);                                \
    mode_t mode = (flags) & (O_CREAT | O_TMPFILE) ? (mode_t)va_arg(list, int) : 0; \
    va_end(list)

/* A child of vfork runs in our memory, but has descriptors of its own: what it closes stays open here. */
static int files_are_ours(void) { return gpu_on() && sys_getpid() == valve.main_pid; }

static int opened(int fd, const char *path)
{
    if (fd >= 0 && files_are_ours())
        gpu_file_opened(fd, path);
    return fd;
}

VALVE_API int open(const char *path, int flags, ...)
{
    MODE_OF(flags, flags);
    NEXT(open);
    return opened(next(path, flags, mode), path);
}

VALVE_API int open64(const char *path, int flags, ...)
{
    MODE_OF(flags, flags);
    NEXT(open64);
    return opened(next(path, flags, mode), path);
}

VALVE_API int openat(int folder, const char *path, int flags, ...)
{
    MODE_OF(flags, flags);
    NEXT(openat);
    return opened(next(folder, path, flags, mode), path);
}

VALVE_API int openat64(int folder, const char *path, int flags, ...)
{
    MODE_OF(flags, flags);
    NEXT(openat64);
    return opened(next(folder, path, flags, mode), path);
}

VALVE_API int close(int fd)
{
    NEXT(close);
    if (files_are_ours())
        gpu_file_closing(fd);
    return next(fd);
}

/* glibc has these two since 2.34; whoever finds ours in an older one must be answered, too. */
VALVE_API int close_range(unsigned first, unsigned last, int flags)
{
    NEXT(close_range);
    if (next == NULL) {
        errno = ENOSYS;
        return -1;
    }
    if (flags == 0 && files_are_ours())
        gpu_files_closing(first, last);
    return next(first, last, flags);
}

VALVE_API void closefrom(int first)
{
    NEXT(closefrom);
    first = first < 0 ? 0 : first;
    if (files_are_ours())
        gpu_files_closing((unsigned)first, ~0u);
    if (next) {
        next(first);
        return;
    }
    for (int fd = first, end = getdtablesize(); fd < end; fd++)
        sys_close(fd);
}

static int copied(int from, int to, int replaced)
{
    if (to >= 0 && to != from && files_are_ours()) {
        if (replaced)
            gpu_file_closing(to); /* what was there before */
        gpu_file_copied(from, to);
    }
    return to;
}

VALVE_API int dup(int fd)
{
    NEXT(dup);
    return copied(fd, next(fd), 0);
}

VALVE_API int dup2(int from, int to)
{
    NEXT(dup2);
    return copied(from, next(from, to), 1);
}

VALVE_API int dup3(int from, int to, int flags)
{
    NEXT(dup3);
    return copied(from, next(from, to, flags), 1);
}

#define FCNTL(name)                                                         \
    VALVE_API int name(int fd, int command, ...)                            \
    {                                                                       \
        va_list list;                                                       \
        va_start(list, command);                                            \
        void *argument = va_arg(list, void *);                              \
        va_end(list);                                                       \
        NEXT(name);                                                         \
        int result = next(fd, command, argument);                           \
        int is_copy = command == F_DUPFD || command == F_DUPFD_CLOEXEC;     \
        return is_copy ? copied(fd, result, 0) : result;                    \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

/* -- fork ------------------------------------------------------------------------------- */

void gpu_forked(void)
{
    int end = atomic_exchange(&valve.gpu_pipe, -1);
    if (end >= 0)
        sys_close(end);
    long at = sys_mmap(GPU_TABLE, sizeof *GPU_TABLE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (sys_failed(at))
        VALVE_SAY("cannot give a forked child its own table: out of memory");
    gpu_control_reset();
    gpu_files_forked();
    gpu_objects_forked();
    gpu_launch_forked();
    atomic_store(&valve.gpu_state, GPU_UNKNOWN);
}
