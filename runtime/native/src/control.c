/* SPDX-License-Identifier: Apache-2.0
 *
 * The control loop: keeps the connection, obeys the agent, watches the lease.
 *
 * Runs as a thread (online) or as the address-space helper (offline).  It waits only in
 * `sys_poll`, takes no lock and allocates nothing; `loop` belongs to it alone.
 */
#include "control.h"
#include "gpu.h"
#include "link.h"
#include "state.h"
#include "sys.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>

#define RETRY_NS (100 * VALVE_NS_PER_MS)
#define REFUSED_RETRY_NS (1000 * VALVE_NS_PER_MS)
#define WELCOME_NS (2000 * VALVE_NS_PER_MS) /* an agent that does not greet in this time is tried anew */
#define UNKNOWN_NS (5000 * VALVE_NS_PER_MS) /* a launcher registers its tenant again within that time */

static struct {
    int in_helper;
    int let_in; /* an agent has let the process in: before that an offline one waits in its constructor */
    int sock, signals, process; /* descriptors; `process` is a pidfd of the process served */
    uint64_t unknown_ns;   /* since when agents have said that they do not know our tenant; 0: they have not */
    uint64_t next_try_ns;  /* LINK_DOWN: when to connect */
    uint64_t linked_ns;    /* since when the link is as it is */
    uint64_t lease_ns;
    uint64_t slab_bytes;   /* what the agent said in WELCOME */
    uint32_t slabs_limit;
    uint32_t want_sent;    /* want_turn that the agent knows */
    int stopped;           /* we stopped the process and no agent has taken over since */
    int told_unreachable, told_refused, told_heartbeat; /* each is said once */
} loop = {.sock = -1, .signals = -1, .process = -1};

void valve_control_reset(void)
{
    if (loop.sock >= 0 && valve_shares_descriptors())
        sys_close(loop.sock);
    if (loop.signals >= 0 && valve_shares_descriptors())
        sys_close(loop.signals);
    __builtin_memset(&loop, 0, sizeof loop);
    loop.sock = loop.signals = loop.process = -1;
    atomic_store(&valve.link, LINK_DOWN);
}

static uint32_t link_state(void) { return atomic_load(&valve.link); }

static void set_link(uint32_t state)
{
    loop.linked_ns = sys_now_ns();
    atomic_store(&valve.link, state);
    sys_futex_wake_all(&valve.link);
}

/* Promise P6: an offline process without an agent does not run. */
static void stop_process(void)
{
    if (!loop.in_helper || !loop.let_in)
        return;
    if (!loop.stopped)
        gpu_stop_all();
    helper_stop_process(loop.process);
    if (!loop.stopped)
        VALVE_SAY("the agent at ", valve.address.sun_path,
                  " is gone; this offline process is stopped until it is back");
    loop.stopped = 1;
}

static void drop(const char *why, uint64_t retry_ns)
{
    if (why) {
        VALVE_SET_ERROR(why);
        VALVE_SAY(why, "; connecting anew");
    }
    if (loop.sock >= 0)
        sys_close(loop.sock);
    loop.sock = -1;
    loop.next_try_ns = sys_now_ns() + retry_ns;
    gpu_unlinked();
    uint32_t asked = ARENA_ASKED; /* the answer will not come: ask the next agent */
    atomic_compare_exchange_strong(&valve.arena, &asked, ARENA_WANTED);
    set_link(LINK_DOWN);
}

static void send_or_drop(int type, void *frame, size_t size, const int *fds, int count)
{
    int result = link_send(loop.sock, type, frame, size, fds, count);
    if (result == -EAGAIN)
        drop("the agent does not read what it is sent", RETRY_NS);
    else if (result < 0)
        drop(NULL, RETRY_NS);
}

void control_send(int type, void *frame, size_t size, const int *fds, int count)
{
    if (loop.sock >= 0)
        send_or_drop(type, frame, size, fds, count);
}

static void connect_and_greet(void)
{
    int sock = link_connect(loop.in_helper);
    if (sock < 0) {
        loop.unknown_ns = 0;
        loop.next_try_ns = sys_now_ns() + RETRY_NS;
        if (!loop.told_unreachable && !loop.stopped) {
            VALVE_SAY("no agent answers at ", valve.address.sun_path,
                      valve.claimed == VALVE_ROLE_OFFLINE ? "; this offline process starts when one does"
                                                          : "; this online process goes on without it");
            VALVE_SET_ERROR("no agent answers at ", valve.address.sun_path);
        }
        loop.told_unreachable = 1;
        return;
    }
    loop.sock = sock;
    set_link(LINK_HELLO);
    link_speak(VALVE_VERSION_MAX);
    struct valve_hello hello = {
        .version_min = VALVE_VERSION_MIN,
        .version_max = VALVE_VERSION_MAX,
        .role_claimed = (uint32_t)valve.claimed,
        .main_pid = (uint32_t)valve.main_pid,
        .flags = (loop.in_helper ? VALVE_HELLO_HELPER : 0u) | (valve.barrier ? VALVE_HELLO_BARRIER : 0u),
        .arena_slabs = atomic_load(&valve.arena) == ARENA_READY ? valve.slabs : 0,
        .library = VALVE_LIBRARY_VERSION,
    };
    __builtin_memcpy(hello.comm, valve.comm, sizeof hello.comm);
    send_or_drop(VALVE_HELLO, &hello, sizeof hello, NULL, 0);
}

static void adopt_doorbell(int fd)
{
    int current = atomic_load(&valve.doorbell);
    if (current < 0) {
        atomic_store(&valve.doorbell, link_move_high(fd));
        return;
    }
    /* Same number, new eventfd: a thread that rings at this moment cannot hit another file. */
    SYS3(SYS_dup3, fd, current, O_CLOEXEC);
    sys_close(fd);
}

static int file_size_is(int fd, uint64_t bytes)
{
    struct stat status;
    return SYS2(SYS_fstat, fd, &status) == 0 && (uint64_t)status.st_size >= bytes;
}

static void on_welcome(struct link_packet *packet)
{
    const struct valve_welcome *frame = (const void *)packet->bytes;
    if (link_state() != LINK_HELLO || (int)frame->role != valve.claimed) {
        drop("the agent sent a welcome that does not fit this process", REFUSED_RETRY_NS);
        return;
    }
    if (!file_size_is(packet->fds[0], sizeof(struct valve_page)) || valve_page_map(packet->fds[0]) != 0) {
        drop("the page that the agent sent cannot be mapped", REFUSED_RETRY_NS);
        return;
    }
    if (packet->count == 2 && !loop.in_helper) {
        adopt_doorbell(packet->fds[1]);
        packet->count = 1;
    }
    loop.lease_ns = frame->lease_ms * VALVE_NS_PER_MS;
    loop.slab_bytes = valve.slab_bytes_told = frame->slab_bytes;
    loop.slabs_limit = valve.slabs_limit = frame->slabs_limit;
    valve.device = frame->device;
    loop.want_sent = 0;
    atomic_store(&valve.role, (int)frame->role);
    if (loop.told_unreachable || loop.told_refused || loop.stopped)
        VALVE_SAY("connected to the agent at ", valve.address.sun_path);
    loop.told_unreachable = loop.told_refused = loop.told_heartbeat = 0;
    loop.unknown_ns = 0;
    loop.let_in = 1;
    loop.stopped = 0; /* from here on the agent decides who runs */
    link_speak(frame->header.version);
    if (valve.claimed == VALVE_ROLE_OFFLINE)
        gpu_linked(frame->device == VALVE_DEVICE_NVIDIA && frame->header.version >= 2);
    if (loop.sock < 0)
        return; /* the agent does not read */
    set_link(LINK_UP);
    valve_page_republish();
    if (atomic_load(&valve.arena) == ARENA_READY) {
        struct valve_arena_restore restore = {.slabs = valve.slabs};
        valve_arena_held(&restore.held);
        send_or_drop(VALVE_ARENA_RESTORE, &restore, sizeof restore, valve_arena_fds(), VALVE_FDS_MAX);
    }
}

static void on_reject(const struct valve_reject *frame)
{
    VALVE_SET_ERROR(frame->text);
    if (loop.unknown_ns == 0)
        loop.unknown_ns = sys_now_ns();
    int is_late = sys_now_ns() > loop.unknown_ns + UNKNOWN_NS;
    /* A tenant may be unknown for a moment: an agent that has just restarted hears of
     * it from its launcher, which reconnects too. */
    int is_final = frame->code != VALVE_EIDENTITY || is_late;
    if (valve.claimed == VALVE_ROLE_OFFLINE && !loop.let_in && is_final) {
        atomic_store(&valve.refused, 1); /* the constructor says so and ends the process */
        set_link(LINK_DOWN);
        SYS1(SYS_exit_group, 0);
    }
    if (is_final && !loop.told_refused)
        VALVE_SAY("the agent refuses this process: ", frame->text);
    loop.told_refused |= is_final;
    drop(NULL, frame->code == VALVE_EIDENTITY ? RETRY_NS : REFUSED_RETRY_NS);
}

static void set_arena(uint32_t state)
{
    atomic_store(&valve.arena, state);
    sys_futex_wake_all(&valve.arena);
}

static void on_arena(struct link_packet *packet)
{
    const struct valve_arena *frame = (const void *)packet->bytes;
    if (atomic_load(&valve.arena) != ARENA_ASKED) {
        drop("the agent sent an arena that was not asked for", RETRY_NS);
        return;
    }
    int fds[VALVE_FDS_MAX];
    for (int i = 0; i < VALVE_FDS_MAX; i++)
        fds[i] = loop.in_helper ? packet->fds[i] : link_move_high(packet->fds[i]);
    packet->count = 0;
    int result = valve_arena_map(frame, fds);
    if (result == 0) {
        set_arena(ARENA_READY);
        return;
    }
    for (int i = 0; i < VALVE_FDS_MAX; i++)
        sys_close(fds[i]);
    VALVE_SET_ERROR(result == -EINVAL ? "the agent sent an arena whose files are too small"
                                      : "no address space for the arena: raise the limit of virtual memory "
                                        "(ulimit -v) or vm.max_map_count");
    set_arena(ARENA_REFUSED);
    drop(valve_last_error(), RETRY_NS); /* the agent must not believe that we have it */
}

static void on_frame(struct link_packet *packet)
{
    struct valve_slabs *slabs = (void *)packet->bytes;
    const struct valve_reject *denied = (const void *)packet->bytes;
    if (packet->type == VALVE_REJECT) {
        on_reject(denied);
        return;
    }
    if (packet->type == VALVE_WELCOME) {
        on_welcome(packet);
        return;
    }
    int is_ready = atomic_load(&valve.arena) == ARENA_READY;
    int is_for_arena = packet->type == VALVE_GRANT || packet->type == VALVE_RECLAIM;
    if (link_state() != LINK_UP || (is_for_arena && !is_ready)) {
        drop("the agent sent a frame out of turn", RETRY_NS);
        return;
    }
    switch (packet->type) {
    case VALVE_ARENA: on_arena(packet); break;
    case VALVE_DENIED: {
        uint32_t asked = ARENA_ASKED;
        VALVE_SET_ERROR(denied->text);
        if (atomic_compare_exchange_strong(&valve.arena, &asked, ARENA_REFUSED))
            sys_futex_wake_all(&valve.arena);
        break;
    }
    case VALVE_GRANT: valve_arena_grant(&slabs->set); break;
    case VALVE_RECLAIM:
        /* Remapped and queued as events before the agent hears of it. */
        valve_arena_reclaim(&slabs->set);
        slabs->at_ns = sys_now_ns();
        send_or_drop(VALVE_RECLAIMED, slabs, sizeof *slabs, NULL, 0);
        break;
    default: break;
    }
}

static void receive_all(void)
{
    static struct link_packet packet;
    while (loop.sock >= 0) {
        int got = link_receive(loop.sock, &packet);
        if (got == 0)
            return;
        if (got < 0) {
            drop(NULL, RETRY_NS);
            return;
        }
        if (packet.type < 0)
            drop(valve_frame_sentence(packet.type), RETRY_NS);
        else
            on_frame(&packet);
        link_close_fds(&packet);
    }
}

static void ask_for_arena(void)
{
    uint64_t bytes = atomic_load(&valve.arena_bytes_wanted);
    uint64_t slabs = bytes / loop.slab_bytes + (bytes % loop.slab_bytes != 0);
    if (bytes == 0)
        slabs = loop.slabs_limit < VALVE_SLABS_MAX ? loop.slabs_limit : VALVE_SLABS_MAX;
    if (slabs > VALVE_SLABS_MAX) {
        VALVE_SET_ERROR("the arena asked for has more than 4096 slabs: ask for less, or raise slabSize in the policy");
        set_arena(ARENA_REFUSED);
        return;
    }
    atomic_store(&valve.arena, ARENA_ASKED);
    struct valve_arena_open frame = {.slabs = slabs};
    send_or_drop(VALVE_ARENA_OPEN, &frame, sizeof frame, NULL, 0);
}

static void serve_requests(void)
{
    struct valve_slabs back = {.id = 0};
    int returned = valve_arena_take_returns(&back.set); /* remapped at once, whether or not there is an agent */
    if (returned && link_state() == LINK_UP) {
        back.at_ns = sys_now_ns();
        send_or_drop(VALVE_RETURN, &back, sizeof back, NULL, 0);
    }
    if (link_state() == LINK_UP && atomic_load(&valve.arena) == ARENA_WANTED)
        ask_for_arena();
    uint32_t turn = atomic_load(&valve.want_turn);
    if (link_state() == LINK_UP && turn != loop.want_sent && atomic_load(&valve.arena) == ARENA_READY) {
        struct valve_want want = {.total = atomic_load(&valve.want_total), .urgent = atomic_load(&valve.want_urgent)};
        loop.want_sent = turn;
        send_or_drop(VALVE_WANT, &want, sizeof want, NULL, 0);
    }
}

/* Nanoseconds until the lease runs out; 0 if it has. */
static uint64_t lease_left_ns(uint64_t now)
{
    uint64_t beat = __atomic_load_n(&valve_page_memory.heartbeat_ns, __ATOMIC_SEQ_CST);
    uint64_t sign = beat > loop.linked_ns ? beat : loop.linked_ns;
    uint64_t end = sign + loop.lease_ns;
    return end > now ? end - now : 0;
}

/* What is due now; returns how long the loop may sleep. */
static uint64_t tend_link(void)
{
    uint64_t now = sys_now_ns();
    if (link_state() == LINK_UP) {
        uint64_t left = lease_left_ns(now);
        if (left > 0)
            return left;
        if (loop.in_helper) {
            stop_process();
            drop(NULL, 0); /* a new connection tells the agent that we stopped */
        } else if (!loop.told_heartbeat) {
            VALVE_SAY("no heartbeat from the agent; this process goes on without it");
            loop.told_heartbeat = 1;
        }
        if (link_state() == LINK_UP)
            return loop.lease_ns;
    }
    if (link_state() == LINK_HELLO && now > loop.linked_ns + WELCOME_NS)
        drop(NULL, 0);
    if (link_state() == LINK_DOWN) {
        stop_process();
        if (now >= loop.next_try_ns)
            connect_and_greet();
    }
    return RETRY_NS;
}

static void open_signals(void)
{
    loop.signals = helper_signals();
    if (!loop.in_helper)
        loop.signals = link_move_high(loop.signals);
}

/* Has the helper nothing more to do? */
static int is_released(void)
{
    enum helper_duty duty = helper_duty(loop.process);
    return duty == DUTY_OVER || (duty == DUTY_HAND_OVER && link_state() != LINK_UP);
}

/* One round: serve, sleep until something happens or is due. */
static void turn(void)
{
    uint64_t sleep_ns = tend_link();
    serve_requests();
    if (link_state() == LINK_DOWN) {
        uint64_t now = sys_now_ns();
        sleep_ns = loop.next_try_ns > now ? loop.next_try_ns - now : 0;
        if (loop.in_helper && loop.let_in && !loop.stopped)
            return; /* stop the process first */
    }
    uint64_t tick_ns = loop.lease_ns ? loop.lease_ns / 4 : RETRY_NS;
    if (loop.in_helper && sleep_ns > tick_ns)
        sleep_ns = tick_ns;
    if (loop.in_helper && is_released())
        SYS1(SYS_exit_group, 0);
    if (loop.signals < 0) /* no descriptor was left at the last try */
        open_signals();
    struct pollfd fds[5] = {{loop.sock, POLLIN, 0}, {loop.signals, POLLIN, 0}, {loop.process, POLLIN, 0},
                            {gpu_bell_fd(), POLLIN, 0}, {gpu_pipe_fd(), POLLIN, 0}};
    if (sys_poll(fds, 5, sleep_ns) <= 0)
        return;
    if (fds[3].revents)
        gpu_on_bell();
    if (fds[4].revents)
        gpu_on_pipe();
    if (fds[1].revents & POLLNVAL)
        open_signals(); /* a process may close descriptors that it does not know */
    else if (fds[1].revents)
        helper_drain_signals(loop.signals);
    if (fds[0].revents)
        receive_all();
}

void valve_control_run(int in_helper)
{
    loop.in_helper = in_helper;
    if (in_helper)
        loop.process = helper_enter();
    open_signals();
    atomic_store(&valve.control_tgid, sys_getpid());
    atomic_store(&valve.control_tid, sys_gettid());
    for (;;)
        turn();
}
