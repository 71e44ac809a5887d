/* SPDX-License-Identifier: Apache-2.0
 * The connection to the agent as packets: see link.h. */
#include "link.h"
#include "sys.h"

#include <fcntl.h>

int link_move_high(int fd)
{
    if (fd < 0 || fd >= VALVE_HIGH_FD)
        return fd;
    int high = sys_fcntl(fd, F_DUPFD_CLOEXEC, VALVE_HIGH_FD);
    if (high < 0)
        return fd; /* RLIMIT_NOFILE is lower than that */
    sys_close(fd);
    return high;
}

static uint16_t speaks = VALVE_VERSION_MAX;

void link_speak(uint16_t version) { speaks = version; }

int link_connect(int keep_low)
{
    int sock = (int)SYS3(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (sock < 0)
        return sock;
    if (!keep_low)
        sock = link_move_high(sock);
    int result = (int)SYS3(SYS_connect, sock, &valve.address, sizeof valve.address);
    if (result == 0)
        return sock;
    sys_close(sock);
    return result;
}

int link_send(int sock, int type, void *frame, size_t size, const int *fds, int count)
{
    static _Atomic uint32_t sequence;
    valve_frame_header(frame, type, size, atomic_fetch_add(&sequence, 1) + 1);
    ((struct valve_header *)frame)->version = speaks;
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int) * VALVE_FDS_MAX)];
    } control;
    struct iovec part = {frame, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        control.header.cmsg_len = CMSG_LEN(sizeof(int) * (size_t)count);
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        __builtin_memcpy(CMSG_DATA(&control.header), fds, sizeof(int) * (size_t)count);
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)count);
    }
    long sent = SYS3(SYS_sendmsg, sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    return sent < 0 ? (int)sent : 0;
}

static void take_fds(struct link_packet *packet, const struct msghdr *message, const struct cmsghdr *header)
{
    if (message->msg_controllen < sizeof *header || header->cmsg_level != SOL_SOCKET ||
        header->cmsg_type != SCM_RIGHTS)
        return;
    packet->count = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    __builtin_memcpy(packet->fds, CMSG_DATA(header), sizeof(int) * (size_t)packet->count);
}

int link_receive(int sock, struct link_packet *packet)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof(int) * VALVE_FDS_MAX)];
    } control;
    struct iovec part = {packet->bytes, sizeof packet->bytes};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
        /* Exactly that many: CMSG_SPACE is rounded up to room for one more.  The kernel closes the rest. */
        .msg_controllen = CMSG_LEN(sizeof(int) * VALVE_FDS_MAX)};
    packet->count = 0;
    long got = SYS3(SYS_recvmsg, sock, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got == -EAGAIN || got == -EINTR)
        return 0;
    if (got < 0)
        return (int)got;
    take_fds(packet, &message, &control.header);
    if (got == 0) { /* no frame is empty: end of the connection */
        link_close_fds(packet);
        return -EPIPE;
    }
    if (message.msg_flags & MSG_CTRUNC)
        packet->type = FRAME_DESCRIPTORS;
    else if (message.msg_flags & MSG_TRUNC)
        packet->type = FRAME_OVERSIZED;
    else
        packet->type = valve_frame_check(packet->bytes, (size_t)got, packet->count);
    return 1;
}

void link_close_fds(struct link_packet *packet)
{
    for (int i = 0; i < packet->count; i++)
        sys_close(packet->fds[i]);
    packet->count = 0;
}
