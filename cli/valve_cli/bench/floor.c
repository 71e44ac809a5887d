/* SPDX-License-Identifier: Apache-2.0
 *
 * The floor of `valve bench preempt`: the least that stopping a process on another
 * process's signal can cost on this machine.  A waker process stamps the time and
 * wakes a futex; this process sleeps on that futex, sends SIGSTOP to the victim,
 * which is its child, and waits until the kernel reports it stopped.  No protocol,
 * no policy, no interpreter.
 *
 *   floor HOLD_US GAP_US COUNTERS_FILE SPINNERS VICTIM ARGS...
 *
 * For each line "N" on stdin: N cycles, then N latencies in ns as uint64_t on stdout,
 * then the number of cycles in which a counter moved while the victim was stopped.
 * Between such blocks the victim is stopped.  It ends at end of file.
 */
#define _GNU_SOURCE
#include "cycle.h"
#include <linux/futex.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

struct shared {
    _Atomic uint32_t go, done, over;
    uint64_t woken_ns, moved;
};

static void futex_wait_for(_Atomic uint32_t *word, uint32_t old)
{
    while (*word == old)
        syscall(SYS_futex, word, FUTEX_WAIT, old, NULL, NULL, 0);
}

static void futex_post(_Atomic uint32_t *word)
{
    ++*word;
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void waker(struct shared *s, struct cycle *c, long cycles)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    for (long i = 0; i < cycles; i++) {
        cycle_gap(c);
        uint32_t done = s->done;
        s->woken_ns = now_ns();
        futex_post(&s->go);
        cycle_hold(c, &s->done, done + 1);
        s->moved += cycle_moved(c);
        futex_post(&s->over);
    }
    _exit(0);
}

int main(int argc, char **argv)
{
    if (argc < 6)
        die_usage("floor HOLD_US GAP_US COUNTERS_FILE SPINNERS VICTIM ARGS...");
    struct cycle c;
    cycle_init(&c, argv + 1);
    struct shared *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (s == MAP_FAILED)
        die("mmap");
    int ready[2];
    if (pipe(ready) != 0)
        die("pipe");
    pid_t victim = fork();
    if (victim == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        dup2(ready[1], 1);
        execv(argv[5], argv + 5);
        die(argv[5]);
    }
    char word[8];
    if (victim < 0 || read(ready[0], word, sizeof word) <= 0)
        die("victim");
    int status;
    kill(victim, SIGSTOP);
    waitpid(victim, &status, WUNTRACED);

    char line[32];
    while (fgets(line, sizeof line, stdin)) {
        long cycles = atol(line);
        uint64_t *latency_ns = calloc((size_t)cycles + 1, sizeof *latency_ns);
        if (!latency_ns)
            die("calloc");
        kill(victim, SIGCONT);
        uint32_t go = s->go, over = s->over;
        s->moved = 0;
        pid_t child = fork();
        if (child < 0)
            die("fork");
        if (child == 0)
            waker(s, &c, cycles);
        for (long i = 0; i < cycles; i++) {
            futex_wait_for(&s->go, go);
            go = s->go;
            kill(victim, SIGSTOP);
            waitpid(victim, &status, WUNTRACED);
            latency_ns[i] = now_ns() - s->woken_ns;
            s->done++;
            futex_wait_for(&s->over, over);
            over = s->over;
            if (i + 1 < cycles)
                kill(victim, SIGCONT);
        }
        waitpid(child, &status, 0);
        latency_ns[cycles] = s->moved;
        fwrite(latency_ns, sizeof *latency_ns, (size_t)cycles + 1, stdout);
        fflush(stdout);
        free(latency_ns);
    }
    kill(victim, SIGKILL);
    waitpid(victim, &status, 0);
    return 0;
}
