/* SPDX-License-Identifier: Apache-2.0
 * What the control loop needs to know of the party that runs it: helper.c. */
#ifndef VALVE_CONTROL_H
#define VALVE_CONTROL_H

/* First thing in the helper: leave the terminal, close every descriptor but stderr.
 * Returns a pidfd of the process served, or -1 where there are none. */
int helper_enter(void);

/* A descriptor that is readable after valve_wake(), or -1. */
int helper_signals(void);
void helper_drain_signals(int fd);

/* 0 once the process served (`pidfd`) is gone, or has become another program by exec. */
int helper_is_needed(int pidfd);

/* SIGSTOP, unless the process is no longer ours to stop. */
void helper_stop_process(int pidfd);

/* In the constructor, before the helper is made: after exec there may still be the helper
 * of the program that this process was before.  Wake it, so that it sees that it is not
 * needed, and wait for it, so that it stays neither as a process nor as a zombie. */
void helper_end_previous(void);

#endif
