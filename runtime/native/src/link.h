/* SPDX-License-Identifier: Apache-2.0
 *
 * The connection to the agent as packets.  Called by the control loop, and for its own
 * connection by arena_nvidia.c; nothing here waits.
 */
#ifndef VALVE_LINK_H
#define VALVE_LINK_H

#include "frame.h"
#include "state.h"

/* A connected, non-blocking socket, or -errno. */
int link_connect(int keep_low);

/* The version that frames carry from now on. */
void link_speak(uint16_t version);

/* Send a frame (its header is filled here) with `count` descriptors.  0 or -errno;
 * -EAGAIN means that the agent does not read. */
int link_send(int sock, int type, void *frame, size_t size, const int *fds, int count);

struct link_packet {
    alignas(8) unsigned char bytes[VALVE_FRAME_MAX];
    int type; /* enum valve_type or enum valve_frame_error */
    int fds[VALVE_FDS_MAX];
    int count;
};

/* 1: a packet (descriptors are the caller's); 0: none now; -errno: the connection is
 * gone (-EPIPE: the agent closed it). */
int link_receive(int sock, struct link_packet *packet);
void link_close_fds(struct link_packet *packet);

/* The same descriptor above VALVE_HIGH_FD (the low one is closed), or unchanged. */
int link_move_high(int fd);

#endif
