/* SPDX-License-Identifier: Apache-2.0
 *
 * What libvalve knows of an offline process's use of NVIDIA GPUs, and who does what.
 *
 * The process's own threads come through the hooks (gpu_hooks.c), keep the table of open
 * driver files (gpu_files.c) and the tree of RM objects (gpu_objects.c), and hand a file to
 * the control loop before its first channel exists.  The control loop (gpu_control.c) owns
 * duplicates of those files, passes them to the agent and, when told to or when there is no
 * agent, disables channels itself.  It shares no lock with the threads: what it reads is the
 * table of valve_protocol.h.
 */
#ifndef VALVE_GPU_H
#define VALVE_GPU_H

#include "state.h"

#include <stdint.h>

/* The table: private memory until the control loop maps the shared one over it. */
extern union valve_gpu_memory {
    struct valve_gpu_table table;
    unsigned char bytes[sizeof(struct valve_gpu_table)];
} valve_gpu_memory;
#define GPU_TABLE (&valve_gpu_memory.table)

struct gpu_message { /* from a thread to the control loop, over valve.gpu_pipe */
    uint32_t is_gone, number, kind;
};

/* gpu_files.c: which descriptor is which driver file */
struct gpu_file {
    _Atomic uint32_t kind; /* enum valve_gpu_file_kind; 0: free */
    _Atomic uint32_t descriptors;
    _Atomic uint32_t sent; /* the control loop has it */
};
int gpu_file_of(int fd);                  /* number, or -1; looks once at descriptors it has not seen */
void gpu_file_opened(int fd, const char *path);
void gpu_file_copied(int from, int to);   /* `to` is a new descriptor of the same file */
void gpu_file_closing(int fd);            /* before close */
void gpu_files_closing(unsigned first, unsigned last);
int gpu_file_hand_over(int fd, int number); /* 0, or -1 and valve_last_error() */
void gpu_files_forked(void);

/* gpu_objects.c: the tree of RM objects, and the channels of it in the table */
struct gpu_new {
    uint32_t client, parent, object, hclass, engine;
    int file;
};
void gpu_object_added(const struct gpu_new *object);
void gpu_object_dupped(uint32_t client, uint32_t parent, uint32_t object, uint32_t source_client, uint32_t source, int file);
uint32_t gpu_object_freeing(uint32_t client, uint32_t object); /* before FREE; a token, 0: not known */
void gpu_object_freed(uint32_t token, int is_done);            /* after it */
void gpu_objects_of_file_gone(int file);
void gpu_objects_forked(void);
void gpu_table_touched(void); /* make the agent look again */

/* gpu_hooks.c */
void gpu_look_up(void); /* in every process, first of all */
void gpu_start(void); /* offline, before its first thread of control */
void gpu_forked(void);
int gpu_on(void);
void gpu_wait_while_held(uint32_t bits);

/* gpu_launch.c */
void *gpu_real_dlsym(void *library, const char *name);
void gpu_launch_forked(void);

/* gpu_control.c: called by the control loop only */
void gpu_linked(int is_nvidia);
void gpu_unlinked(void);
void gpu_on_pipe(void);
void gpu_on_bell(void);
int gpu_pipe_fd(void);
int gpu_bell_fd(void);
void gpu_stop_all(void); /* there is no agent: disable what this process has */
void gpu_control_reset(void);

/* control.c: for gpu_control.c */
void control_send(int type, void *frame, size_t size, const int *fds, int count);

#endif
