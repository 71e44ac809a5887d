/* SPDX-License-Identifier: Apache-2.0
 *
 * Where libvalve enters a process.  The constructor is this library's main(): the only
 * place that reads the environment.
 *
 *   VALVE_SOCKET     path of the agent's socket; unset: the library does nothing at all
 *   VALVE_WORKLOAD   online | offline
 *   VALVE_PYTHONPATH put in front of the process's PYTHONPATH; unset: PYTHONPATH stays
 *   VALVE_FAULT      drop-lost: valve_poll hides losses (tests that prove that checks have power)
 *
 * An offline process does not return from the constructor until the agent has let it in
 * (P6).  An online process is not touched until it uses the API, and never waits (P5).
 */
#include "gpu.h"
#include "state.h"
#include "sys.h"

#include <linux/membarrier.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

struct valve_state valve = {.doorbell = -1, .gpu_pipe = -1, .gpu_control_end = -1};

const char *valve_version(void) { return VALVE_LIBRARY_VERSION; }

int valve_role(void)
{
    int confirmed = atomic_load(&valve.role);
    return confirmed ? confirmed : valve.claimed;
}

int valve_device(void)
{
    /* Written before the first UP, and every agent of a process serves the same device. */
    atomic_load(&valve.link);
    return valve_start() ? (int)valve.device : 0;
}

int valve_connected(void)
{
    return valve_start() && atomic_load(&valve.link) == LINK_UP;
}

int valve_attach(int timeout_ms)
{
    if (!valve_start())
        return 0;
    uint64_t deadline_ns = sys_now_ns() + (uint64_t)(timeout_ms > 0 ? timeout_ms : 0) * VALVE_NS_PER_MS;
    uint32_t link;
    while ((link = atomic_load(&valve.link)) != LINK_UP) {
        uint64_t now = sys_now_ns();
        if (now >= deadline_ns)
            return 0;
        sys_futex_wait(&valve.link, link, deadline_ns - now);
    }
    return 1;
}

int valve_start(void)
{
    int state = atomic_load(&valve.started);
    if (state != START_NO || !valve.enabled)
        return state == START_RUNNING;
    if (!atomic_compare_exchange_strong(&valve.started, &state, START_RUNNING))
        return state == START_RUNNING;
    int result = valve_spawn_thread();
    if (result != 0) {
        VALVE_SAY("no thread for Valve in this online process; it goes on without");
        atomic_store(&valve.started, START_FAILED);
    }
    return result == 0;
}

void valve_wake(void)
{
    int tgid = atomic_load(&valve.control_tgid), tid = atomic_load(&valve.control_tid);
    if (tid != 0) /* SIGURG: blocked in the control loop, and harmless should its id ever be another's */
        SYS3(SYS_tgkill, tgid, tid, SIGURG);
}

static void refuse(const char *sentence, const char *detail)
{
    VALVE_SAY(sentence, detail);
    _exit(78); /* EX_CONFIG */
}

static void enter_offline(void)
{
    /* Before we make a helper of our own: after exec, that of the program before may still hold
     * the connection until ours has taken over. */
    int has_previous = SYS4(SYS_wait4, -1, NULL, WNOHANG | __WCLONE, NULL) == 0;
    valve.barrier =
        SYS3(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) == 0;
    int helper = valve_spawn_helper();
    char number[24];
    if (helper < 0)
        refuse("no helper for this offline process: clone failed with error ",
               valve_decimal((uint64_t)-helper, number));
    atomic_store(&valve.started, START_RUNNING);
    uint32_t link;
    while ((link = atomic_load(&valve.link)) != LINK_UP) {
        if (atomic_load(&valve.refused))
            refuse("the agent refuses this offline process: ", valve_last_error());
        sys_futex_wait(&valve.link, link, 100 * VALVE_NS_PER_MS);
        if (helper > 0 && SYS4(SYS_wait4, helper, NULL, WNOHANG | __WALL, NULL) == helper &&
            !atomic_load(&valve.refused))
            refuse("the helper of this offline process died; see the kernel's log", "");
    }
    int pipe = atomic_load(&valve.gpu_state) == GPU_UNCONTROLLED ? atomic_exchange(&valve.gpu_pipe, -1) : -1;
    if (pipe >= 0) /* no GPU, no driver files: leave no descriptor in the process */
        sys_close(pipe);
    for (int tries = 0; has_previous && tries < 50; tries++) { /* it ends now: leave no zombie */
        has_previous = SYS4(SYS_wait4, -1, NULL, WNOHANG | __WCLONE, NULL) == 0;
        if (has_previous)
            sys_sleep_ns(VALVE_NS_PER_MS);
    }
}

static void note_process(void)
{
    valve.main_pid = sys_getpid();
    prctl(PR_GET_NAME, valve.comm);
    valve.comm[sizeof valve.comm - 1] = 0;
}

/* The child of fork is a process of its own: it has no connection, page or arena of
 * its parent's, and attaches anew. */
static void after_fork_in_child(void)
{
    int doorbell = atomic_exchange(&valve.doorbell, -1);
    if (doorbell >= 0)
        sys_close(doorbell);
    valve_control_reset();
    valve_arena_forget();
    gpu_forked();
    valve_page_reset();
    atomic_store(&valve.control_tid, 0);
    atomic_store(&valve.started, START_NO);
    atomic_store(&valve.role, 0);
    atomic_store(&valve.busy_word, 0);
    for (int i = 0; i < 5; i++)
        atomic_store(&valve.counts[i], 0);
    note_process();
    if (valve.claimed == VALVE_ROLE_OFFLINE)
        enter_offline();
}

__attribute__((constructor)) static void enter(void)
{
    gpu_look_up();
    const char *path = secure_getenv("VALVE_SOCKET");
    if (path == NULL || *path == 0)
        return;
    valve_python_path(secure_getenv("VALVE_PYTHONPATH"));
    const char *role = secure_getenv("VALVE_WORKLOAD");
    if (role != NULL && strcmp(role, "online") == 0)
        valve.claimed = VALVE_ROLE_ONLINE;
    else if (role != NULL && strcmp(role, "offline") == 0)
        valve.claimed = VALVE_ROLE_OFFLINE;
    else
        refuse("VALVE_WORKLOAD must be online or offline; it is ", role ? role : "not set");
    if (strlen(path) >= sizeof valve.address.sun_path) {
        static const char sentence[] = "VALVE_SOCKET is longer than the 107 bytes that a socket's path may have: ";
        if (valve.claimed == VALVE_ROLE_OFFLINE)
            refuse(sentence, path);
        VALVE_SAY(sentence, path);
        return;
    }
    valve.address.sun_family = AF_UNIX;
    valve_copy_text(valve.address.sun_path, sizeof valve.address.sun_path, path);
    const char *fault = secure_getenv("VALVE_FAULT");
    valve.drop_lost = fault != NULL && strcmp(fault, "drop-lost") == 0;
    note_process();
    pthread_atfork(NULL, NULL, after_fork_in_child);
    valve.enabled = 1;
    if (valve.claimed == VALVE_ROLE_OFFLINE) {
        gpu_start();
        enter_offline();
    }
}
