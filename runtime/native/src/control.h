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

/* What the helper owes the process served (`pidfd`).  After exec it only holds the
 * connection, so that the agent sees no gap in which it would stop the process before its
 * next program has a helper; the agent closes it when that one connects. */
enum helper_duty { DUTY_SERVE, DUTY_HAND_OVER, DUTY_OVER };
enum helper_duty helper_duty(int pidfd);

/* SIGSTOP, unless the process is no longer ours to stop. */
void helper_stop_process(int pidfd);

#endif
