/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzzes what libvalve takes off the wire, under AddressSanitizer and
 * UndefinedBehaviorSanitizer:  fuzz SEED FRAMES PACKETS
 *
 *   FRAMES   buffers given to valve_frame_check, each in an allocation of its own size
 *   PACKETS  packets through a socket into the control loop of a process with an arena,
 *            with descriptors now and then; slab events are drained as an engine does
 *
 * Prints how many were accepted; a crash is the sanitizer's to report.
 */
#include "../../runtime/native/src/control.c"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static uint64_t dice;

static uint64_t roll(uint64_t below)
{
    dice ^= dice << 13;
    dice ^= dice >> 7;
    dice ^= dice << 17;
    return dice % below;
}

static const struct {
    int type;
    size_t size;
} KINDS[] = {
    {VALVE_WELCOME, sizeof(struct valve_welcome)}, {VALVE_REJECT, sizeof(struct valve_reject)},
    {VALVE_ARENA, sizeof(struct valve_arena)},     {VALVE_GRANT, sizeof(struct valve_slabs)},
    {VALVE_RECLAIM, sizeof(struct valve_slabs)},   {VALVE_DENIED, sizeof(struct valve_reject)},
    {VALVE_HELLO, sizeof(struct valve_hello)},     {VALVE_WANT, sizeof(struct valve_want)},
};

/* A frame that is valid, or nearly so, or noise; its size. */
static size_t make(unsigned char *at, size_t room)
{
    size_t kind = roll(sizeof KINDS / sizeof KINDS[0]), size = KINDS[kind].size;
    for (size_t i = 0; i < room; i += 8) {
        uint64_t noise = roll(4) ? 0 : roll(UINT64_MAX);
        memcpy(at + i, &noise, room - i < 8 ? room - i : 8);
    }
    valve_frame_header((struct valve_header *)at, KINDS[kind].type, size, 0);
    if (KINDS[kind].type == VALVE_ARENA && roll(2))
        *(struct valve_arena *)at = (struct valve_arena){
            *(struct valve_header *)at, 1 + roll(8), 65536, roll(2) ? 65536 : 4096, VALVE_LEDGER_BYTES(8)};
    if (KINDS[kind].type == VALVE_WELCOME && roll(2)) {
        struct valve_welcome *welcome = (void *)at;
        welcome->role = VALVE_ROLE_ONLINE;
        welcome->device = VALVE_DEVICE_CPU;
        welcome->slab_bytes = 65536;
        welcome->lease_ms = 1000;
    }
    if (KINDS[kind].type == VALVE_REJECT || KINDS[kind].type == VALVE_DENIED)
        at[size - 1] = (unsigned char)(roll(4) == 0);
    switch (roll(8)) {
    case 0: return roll(size + 1);               /* truncated */
    case 1: return size + roll(room - size + 1); /* oversized */
    case 2: at[roll(16)] ^= (unsigned char)(1 + roll(255)); break;
    case 3: at[roll(size)] ^= (unsigned char)(1 + roll(255)); break;
    default: break;
    }
    return size;
}

static void check_frames(long count)
{
    long accepted = 0;
    unsigned char scratch[1536];
    for (long n = 0; n < count; n++) {
        size_t size = make(scratch, sizeof scratch);
        unsigned char *exact = malloc(size ? size : 1); /* a read past the end is seen */
        if (exact == NULL)
            abort();
        memcpy(exact, scratch, size);
        int type = valve_frame_check(exact, size, (int)roll(4));
        accepted += type > 0;
        if (type == VALVE_GRANT || type == VALVE_RECLAIM) {
            const struct valve_bitmap *set = &((struct valve_slabs *)exact)->set;
            uint32_t end = (uint32_t)(1 + roll(VALVE_SLABS_MAX)), past = 0, members = 0;
            for (uint32_t at = valve_bitmap_run(set, 0, end, &past); at < end;
                 at = valve_bitmap_run(set, past, end, &past))
                members += past - at;
            for (uint32_t i = 0; i < end; i++)
                members -= (uint32_t)valve_bitmap_has(set, i);
            if (members != 0)
                abort(); /* the runs are not the set */
        }
        if (type <= 0 && valve_frame_sentence(type)[0] == 0)
            abort();
        free(exact);
    }
    printf("frames %ld accepted %ld\n", count, accepted);
}

static int peer = -1;

static void fresh_link(void)
{
    int pair[2];
    if (peer >= 0)
        close(peer);
    if (loop.sock >= 0)
        close(loop.sock);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair) != 0)
        abort();
    loop.sock = pair[0];
    peer = pair[1];
    atomic_store(&valve.link, roll(3) ? LINK_UP : LINK_HELLO);
}

static void send_packet(const unsigned char *bytes, size_t size, const int *files, int count)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int) * 8)];
    } control = {.room = {0}};
    struct iovec part = {(void *)bytes, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        control.header.cmsg_len = CMSG_LEN(sizeof(int) * (size_t)count);
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        memcpy(CMSG_DATA(&control.header), files, sizeof(int) * (size_t)count);
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)count);
    }
    if (sendmsg(peer, &message, MSG_NOSIGNAL) < 0 && size > 0)
        fresh_link();
}

static void serve_packets(long count)
{
    int files[8];
    for (int i = 0; i < 8; i++) {
        files[i] = memfd_create("fuzz", MFD_CLOEXEC);
        if (files[i] < 0 || ftruncate(files[i], 16 << 20) != 0)
            abort();
    }
    valve.claimed = VALVE_ROLE_ONLINE;
    valve.main_pid = getpid();
    atomic_store(&valve.control_tid, 0);
    loop.lease_ns = 1000000000u;
    loop.slab_bytes = 65536;
    long kept = 0, events = 0;
    unsigned char scratch[1536];
    struct valve_event event;
    struct valve_bitmap held;
    for (long n = 0; n < count; n++) {
        if (loop.sock < 0)
            fresh_link();
        uint32_t arena = atomic_load(&valve.arena);
        if (arena == ARENA_NONE || arena == ARENA_REFUSED || arena == ARENA_WANTED)
            atomic_store(&valve.arena, ARENA_ASKED);
        size_t size = make(scratch, sizeof scratch);
        int type = size >= sizeof(struct valve_header) ? ((struct valve_header *)scratch)->type : 0;
        int fits = type == VALVE_ARENA ? 3 : type == VALVE_WELCOME ? 2 : 0;
        send_packet(scratch, size, files, roll(8) ? fits : (int)roll(9));
        receive_all();
        serve_requests();
        kept += loop.sock >= 0;
        while (peer >= 0 && recv(peer, scratch, sizeof scratch, MSG_DONTWAIT) > 0)
            ;
        while (valve_poll(&event)) {
            events++;
            if (event.slab >= valve.slabs)
                abort();
            if (event.kind == VALVE_EVENT_GRANTED && roll(3) == 0)
                valve_return(event.slab);
        }
        if (atomic_load(&valve.arena) == ARENA_READY) {
            for (uint32_t i = 0; i < valve.slabs; i++) /* every slab can be touched at all times */
                ((volatile char *)valve.base)[i * valve.slab_bytes]++;
            valve_arena_held(&held);
            if (roll(500) == 0)
                valve_arena_forget(); /* and everything from the start */
        }
    }
    printf("packets %ld kept %ld events %ld\n", count, kept, events);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    dice = strtoull(argv[1], NULL, 0) * 2654435761u + 88172645463325252u;
    check_frames(strtol(argv[2], NULL, 0));
    serve_packets(strtol(argv[3], NULL, 0));
    return 0;
}
