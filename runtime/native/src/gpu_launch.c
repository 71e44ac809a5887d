/* SPDX-License-Identifier: Apache-2.0
 *
 * Route launch-gate: kernel and graph launches (and copies, which would touch memory that is
 * being taken) wait while a hold is in force.  On every route launches wait from the moment
 * the agent decides to pause, so nothing is queued behind a slow driver call.
 *
 * CUDA's entry points are reached by three ways, and all lead here: by linking against
 * libcuda, by dlsym, and by cuGetProcAddress, which the CUDA runtime uses.  What is found is
 * wrapped: one of the numbered functions below, each with one real function behind it.
 *
 * "Held" is not "stopped": what was launched runs to its end.  So on this route the thread
 * `drain` waits for every context that has launched something and then answers the agent.
 */
#include "gpu.h"
#include "memory_limit.h"
#include "sys.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <string.h>

#define WRAPPERS 64
#define CONTEXTS_MAX 32

/* Eleven at most. */
#define PARAMETERS long a, long b, long c, long d, long e, long f, long g, long h, long i, long j, long k
#define ARGUMENTS a, b, c, d, e, f, g, h, i, j, k
typedef int launch(PARAMETERS);

static struct {
    launch *real;
    int is_copy;
} wrapped[WRAPPERS];
static uint32_t wrapped_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static _Atomic int inside; /* threads between the check of the hold and the end of the launch */
static void *_Atomic contexts[CONTEXTS_MAX];
static _Atomic int is_draining; /* the thread runs */
static int (*get_current)(void **);
static int (*set_current)(void *);
static int (*synchronize)(void);

static int by_launch_gate(void)
{
    return __atomic_load_n(&GPU_TABLE->route, __ATOMIC_SEQ_CST) == VALVE_ROUTE_LAUNCH_GATE;
}

static void note_context(void)
{
    void *current = NULL;
    if (get_current == NULL || get_current(&current) != 0 || current == NULL)
        return;
    for (int n = 0; n < CONTEXTS_MAX; n++) {
        void *known = atomic_load(&contexts[n]);
        if (known == current || (known == NULL && atomic_compare_exchange_strong(&contexts[n], &known, current)) ||
            known == current)
            return;
    }
}

/* The count goes up before the hold is read and the agent sets the hold before it asks for the
 * count to be zero: one of the two sees the other. */
static void begin(int is_copy)
{
    while (gpu_on()) {
        atomic_fetch_add(&inside, 1);
        uint32_t hold = __atomic_load_n(&GPU_TABLE->hold, __ATOMIC_SEQ_CST);
        if (!(hold & VALVE_GPU_HOLD_LAUNCHES) || (is_copy && !by_launch_gate()))
            break;
        atomic_fetch_sub(&inside, 1);
        __atomic_fetch_add(&GPU_TABLE->launches_held, 1, __ATOMIC_SEQ_CST);
        gpu_wait_while_held(VALVE_GPU_HOLD_LAUNCHES);
    }
    if (!gpu_on())
        atomic_fetch_add(&inside, 1);
    else if (by_launch_gate())
        note_context();
}

static int through(uint32_t number, PARAMETERS)
{
    /* libcuda may call one of them from another.  The model needs nothing of the dynamic loader. */
    static __thread int depth __attribute__((tls_model("initial-exec")));
    if (depth++ == 0)
        begin(wrapped[number].is_copy);
    int result = wrapped[number].real(ARGUMENTS);
    if (--depth == 0)
        atomic_fetch_sub(&inside, 1);
    return result;
}

#include "numbered.h"

/* -- draining ---------------------------------------------------------------------------- */

static void drain(void)
{
    while (atomic_load(&inside) != 0)
        sys_sleep_ns(20000);
    for (int n = 0; n < CONTEXTS_MAX; n++) {
        void *context = atomic_load(&contexts[n]);
        if (context && set_current(context) == 0)
            (void)synchronize(); /* an error means a context that is broken or gone: it executes nothing */
    }
}

static void *drain_main(void *nothing)
{
    uint64_t done = 0;
    (void)nothing;
    pthread_setname_np(pthread_self(), "valve-drain");
    for (;;) {
        uint64_t command = __atomic_load_n(&GPU_TABLE->command, __ATOMIC_SEQ_CST);
        if (command == done || !by_launch_gate()) {
            sys_futex_wait_shared(&GPU_TABLE->command, (uint32_t)command, 100 * VALVE_NS_PER_MS);
            continue;
        }
        if ((command & 3) != VALVE_GPU_RUN)
            drain();
        done = command;
        GPU_TABLE->answer = 0;
        __atomic_store_n(&GPU_TABLE->answered, command, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void *symbol_of_cuda(const char *name)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return library ? gpu_real_dlsym(library, name) : NULL;
}

static void start_draining(void)
{
    *(void **)&get_current = symbol_of_cuda("cuCtxGetCurrent");
    *(void **)&set_current = symbol_of_cuda("cuCtxSetCurrent");
    *(void **)&synchronize = symbol_of_cuda("cuCtxSynchronize");
    if (get_current && set_current && synchronize) /* else the agent's order stays unanswered, so it knows */
        atomic_store(&is_draining, valve_start_thread(drain_main) == 0);
}

/* -- finding ----------------------------------------------------------------------------- */

enum what { NOTHING, LAUNCH, COPY, FINDER };

static enum what what_is(const char *name)
{
    if (strncmp(name, "cu", 2) != 0)
        return NOTHING;
    if (strncmp(name, "cuLaunch", 8) == 0 || strncmp(name, "cuGraphLaunch", 13) == 0)
        return LAUNCH;
    if (strncmp(name, "cuMemcpy", 8) == 0 || strncmp(name, "cuMemset", 8) == 0)
        return COPY;
    return strncmp(name, "cuGetProcAddress", 16) == 0 ? FINDER : NOTHING;
}

static void *wrap(void *real, enum what what)
{
    void *result = real;
    pthread_mutex_lock(&lock);
    uint32_t n = 0;
    while (n < wrapped_count && wrapped[n].real != (launch *)real && wrappers[n] != (launch *)real)
        n++;
    if (n < WRAPPERS) {
        if (n == wrapped_count) {
            wrapped[n].is_copy = what == COPY;
            wrapped[n].real = (launch *)real;
            wrapped_count++;
            if (what == LAUNCH)
                __atomic_fetch_add(&GPU_TABLE->launch_hooks, 1, __ATOMIC_SEQ_CST);
        }
        result = (void *)wrappers[n];
    } else {
        VALVE_SAY("more launch functions than libvalve can hold: launches of this process are not held");
    }
    if (!atomic_load(&is_draining))
        start_draining();
    pthread_mutex_unlock(&lock);
    return result;
}

typedef int finder(const char *, void **, int, uint64_t, int *);
static finder *real_finder, *real_finder_v2;

static int after_finding(int result, const char *name, void **function, int version);

/* The first version has no `status`: a caller of it leaves there what it likes, and the real one does not look. */
static int find(const char *name, void **function, int version, uint64_t flags, int *status)
{
    return after_finding(real_finder(name, function, version, flags, status), name, function, version);
}

static int find_v2(const char *name, void **function, int version, uint64_t flags, int *status)
{
    return after_finding(real_finder_v2(name, function, version, flags, status), name, function, version);
}

static void *instead_of(void *real, const char *name, enum what what, int is_v2)
{
    if (what != FINDER)
        return wrap(real, what);
    if (real == (void *)find || real == (void *)find_v2)
        return real; /* it was found through us already */
    is_v2 = is_v2 || strcmp(name, "cuGetProcAddress_v2") == 0;
    *(is_v2 ? &real_finder_v2 : &real_finder) = (finder *)real;
    return is_v2 ? (void *)find_v2 : (void *)find;
}

static int after_finding(int result, const char *name, void **function, int version)
{
    enum what what = result == 0 && name && function && *function ? what_is(name) : NOTHING;
    if (result == 0 && name && function && *function && gpu_on() && memory_limit_wants(name, 0))
        *function = memory_limit_wrap(name, *function);
    if (what != NOTHING && gpu_on()) /* asked by its base name, it gives the newest that this version of CUDA had */
        *function = instead_of(*function, name, what, version >= 12000);
    return result;
}

typedef void *finds_symbol(void *, const char *);
static finds_symbol *next_dlsym;

void *gpu_real_dlsym(void *library, const char *name)
{
    if (next_dlsym == NULL) {
        static const char *const versions[] = {"GLIBC_2.34", "GLIBC_2.17", "GLIBC_2.2.5"};
        for (int n = 0; n < 3 && next_dlsym == NULL; n++)
            next_dlsym = (finds_symbol *)dlvsym(RTLD_NEXT, "dlsym", versions[n]);
    }
    return library ? next_dlsym(library, name) : NULL;
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
static void *found_for(void *library, const char *name)
{
    enum what what = gpu_on() ? what_is(name) : NOTHING;
    int is_memory = gpu_on() && memory_limit_wants(name, 1);
    if ((what == NOTHING && !is_memory) || library == RTLD_NEXT)
        return NULL;
    void *real = next_dlsym(library, name);
    Dl_info from, ours;
    if (real == NULL || !dladdr(real, &from) || !dladdr((void *)&wrapped, &ours) || from.dli_fbase == ours.dli_fbase)
        return real; /* one of our own below */
    return is_memory ? memory_limit_wrap(name, real) : instead_of(real, name, what, 0);
}

/* The last call is a jump, so that for RTLD_NEXT the real dlsym sees who called us.  (Not in
 * sanitizer builds: their runtimes look up functions this way before anything is ready.) */
VALVE_API void *dlsym(void *__restrict library, const char *__restrict name)
{
    if (__builtin_expect(next_dlsym == NULL, 0))
        (void)gpu_real_dlsym(NULL, NULL);
    void *found = found_for(library, name);
    if (found)
        return found;
    return next_dlsym(library, name);
}

/* For programs linked against libcuda. */
static void *behind(const char *name)
{
    void *real = next_dlsym ? next_dlsym(RTLD_NEXT, name) : NULL;
    return real ? real : symbol_of_cuda(name);
}

#define LINKED(name)                                                                \
    VALVE_API int name(PARAMETERS);                                                 \
    VALVE_API int name(PARAMETERS)                                                  \
    {                                                                               \
        static launch *wrapper;                                                     \
        launch *go = __atomic_load_n(&wrapper, __ATOMIC_SEQ_CST);                   \
        if (go == NULL) {                                                           \
            (void)gpu_real_dlsym(NULL, NULL);                                       \
            void *real = behind(#name);                                             \
            if (real == NULL)                                                       \
                return 500; /* CUDA_ERROR_NOT_FOUND */                              \
            go = gpu_on() ? (launch *)wrap(real, LAUNCH) : (launch *)real;          \
            __atomic_store_n(&wrapper, go, __ATOMIC_SEQ_CST);                       \
        }                                                                           \
        return go(ARGUMENTS);                                                       \
    }
LINKED(cuLaunchKernel)
LINKED(cuLaunchKernel_ptsz)
LINKED(cuLaunchKernelEx)
LINKED(cuLaunchKernelEx_ptsz)
LINKED(cuLaunchCooperativeKernel)
LINKED(cuLaunchCooperativeKernel_ptsz)
LINKED(cuLaunchCooperativeKernelMultiDevice)
LINKED(cuLaunch)
LINKED(cuLaunchGrid)
LINKED(cuLaunchGridAsync)
LINKED(cuGraphLaunch)
LINKED(cuGraphLaunch_ptsz)
#endif

/* Threads do not come along into a child, and CUDA does not work there. */
void gpu_launch_forked(void)
{
    memory_limit_forked();
    pthread_mutex_init(&lock, NULL);
    atomic_store(&inside, 0);
    atomic_store(&is_draining, 0);
    for (int n = 0; n < CONTEXTS_MAX; n++)
        atomic_store(&contexts[n], NULL);
}
