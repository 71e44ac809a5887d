/* SPDX-License-Identifier: Apache-2.0
 *
 * A tenant process that does what it is told on stdin, one command a line, and
 * answers with one line each.  Built plain (libvalve preloaded) and together with
 * libvalve's sources under the sanitizers.
 */
#include "valve.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile unsigned char *base;
static uint64_t slab_bytes;
static uint32_t slabs;
static _Atomic uint64_t touches;
static char **arguments;

/* Touches every slab, granted or not, for ever. */
static void *hammer(void *nothing)
{
    for (;;)
        for (uint32_t i = 0; i < slabs; i++) {
            volatile unsigned char *at = base + i * slab_bytes + 4096;
            *at = (unsigned char)(*at + 1);
            at[slab_bytes - 8192]++;
            atomic_fetch_add(&touches, 1);
        }
    return nothing;
}

/* Many threads on the API at once: for ThreadSanitizer. */
static void *storm(void *rounds)
{
    struct valve_event event;
    for (long n = (long)rounds; n > 0; n--) {
        valve_busy();
        valve_count(VALVE_COUNT_TOKENS, 1);
        if (valve_poll(&event) && event.kind == VALVE_EVENT_GRANTED && n % 3 == 0)
            valve_return(event.slab);
        valve_want((uint32_t)n % 8, 0);
        valve_idle((uint64_t)n);
        (void)valve_connected();
    }
    return NULL;
}

static void say_fds(void)
{
    printf("fds");
    for (int fd = 0; fd < 1024; fd++)
        if (fcntl(fd, F_GETFD) >= 0)
            printf(" %d%s", fd, fd > 2 && !(fcntl(fd, F_GETFD) & FD_CLOEXEC) ? "!" : "");
    printf("\n");
}

static void say_events(void)
{
    struct valve_event event;
    printf("events");
    while (valve_poll(&event))
        printf(" %c%u", event.kind == VALVE_EVENT_GRANTED ? 'G' : 'L', event.slab);
    printf("\n");
}

static void in_child(void)
{
    pid_t child = fork();
    if (child == 0) {
        valve_busy();
        valve_count(VALVE_COUNT_TOKENS, 1000);
        int mapped = base != NULL && msync((void *)base, slab_bytes, MS_ASYNC) == 0;
        printf("child %d role %d mapped %d\n", (int)getpid(), valve_role(), mapped);
        fflush(stdout);
        char line[64];
        if (read(0, line, sizeof line) < 0) /* stay until the test says so */
            _exit(9);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    printf("status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status));
}

static void write_ledger(char *words)
{
    unsigned a, b;
    valve_ledger_begin();
    for (char *word = strtok(words, " "); word; word = strtok(NULL, " ")) {
        if (sscanf(word, "request:%u:%u", &a, &b) == 2)
            valve_ledger_request(a, b);
        else if (sscanf(word, "own:%u:%u", &a, &b) == 2)
            valve_ledger_own(a, b);
        else if (sscanf(word, "pin:%u", &a) == 1)
            valve_ledger_pin(a);
        else if (strcmp(word, "commit") == 0)
            valve_ledger_commit();
    }
    printf("ok\n");
}

static void open_arena(uint64_t bytes, int timeout_ms)
{
    base = valve_arena_open(bytes, timeout_ms, &slab_bytes, &slabs);
    if (base == NULL)
        printf("denied %s\n", valve_last_error());
    else
        printf("arena %u %" PRIu64 " %d\n", slabs, slab_bytes, (uintptr_t)base % (2 << 20) == 0);
}

static int obey(char *line)
{
    uint64_t n;
    unsigned a, b;
    pthread_t thread;
    if (sscanf(line, "open %" SCNu64 " %u", &n, &a) == 2)
        open_arena(n, (int)a);
    else if (strcmp(line, "hammer") == 0)
        printf("ok %d\n", pthread_create(&thread, NULL, hammer, NULL));
    else if (strcmp(line, "touches") == 0)
        printf("touches %" PRIu64 "\n", atomic_load(&touches));
    else if (strcmp(line, "events") == 0)
        say_events();
    else if (strcmp(line, "busy") == 0)
        valve_busy(), printf("ok\n");
    else if (sscanf(line, "idle %" SCNu64, &n) == 1)
        valve_idle(n), printf("ok\n");
    else if (sscanf(line, "count %u %u", &a, &b) == 2)
        valve_count((int)a, b), printf("ok\n");
    else if (sscanf(line, "want %u %u", &a, &b) == 2)
        printf("want %d\n", valve_want(a, (int)b));
    else if (sscanf(line, "wants %u", &a) == 1) {
        for (b = 1; b <= a; b++)
            valve_want(b % 64, 0);
        printf("ok\n");
    } else if (sscanf(line, "return %u", &a) == 1)
        printf("return %d\n", valve_return(a));
    else if (sscanf(line, "fill %u %u", &a, &b) == 2) {
        memset((void *)(base + a * slab_bytes), (int)b, slab_bytes);
        printf("ok\n");
    } else if (sscanf(line, "read %u", &a) == 1)
        printf("read %d %d\n", base[a * slab_bytes], base[(a + 1) * slab_bytes - 1]);
    else if (strncmp(line, "ledger ", 7) == 0)
        write_ledger(line + 7);
    else if (strcmp(line, "state") == 0)
        printf("state role %d connected %d error %s\n", valve_role(), valve_connected(), valve_last_error());
    else if (sscanf(line, "attach %u", &a) == 1)
        printf("attach %d\n", valve_attach((int)a));
    else if (strcmp(line, "fds") == 0)
        say_fds();
    else if (strcmp(line, "wait") == 0) {
        int found = (int)waitpid(-1, NULL, WNOHANG);
        printf("wait %d %s\n", found, strerror(errno));
    } else if (strcmp(line, "close-all") == 0)
        printf("ok %d\n", close_range(3, ~0u, 0));
    else if (strcmp(line, "eat-mappings") == 0) {
        long eaten = 0;
        void *last = NULL;
        for (; last != MAP_FAILED; eaten++) /* neighbours with different rights do not merge */
            last = mmap(NULL, 4096, eaten % 2 ? PROT_READ : PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        printf("eaten %ld\n", eaten);
    } else if (strcmp(line, "fork") == 0)
        in_child();
    else if (strcmp(line, "exec") == 0) {
        execv("/proc/self/exe", arguments);
        printf("exec failed\n");
    } else if (strcmp(line, "exec-bare") == 0) {
        execve("/proc/self/exe", arguments, (char *[]){NULL});
        printf("exec failed\n");
    } else if (sscanf(line, "storm %u %u", &a, &b) == 2) {
        pthread_t threads[16];
        for (unsigned i = 0; i < a && i < 16; i++)
            pthread_create(&threads[i], NULL, storm, (void *)(long)b);
        for (unsigned i = 0; i < a && i < 16; i++)
            pthread_join(threads[i], NULL);
        printf("ok\n");
    } else
        return 0;
    return 1;
}

/* kcmp fails with EPERM from here on, in children and after exec too. */
static void forbid_kcmp(void)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_kcmp, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
        _exit(8);
}

static void *serve(void *nothing)
{
    char line[4096];
    printf("ready %d\n", (int)getpid());
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (!obey(line))
            printf("what? %s\n", line);
        fflush(stdout);
    }
    exit(0);
    return nothing;
}

int main(int count, char **values)
{
    arguments = values;
    setvbuf(stdin, NULL, _IONBF, 0); /* a child or the next program reads on where we stopped */
    if (count > 1 && strcmp(values[1], "no-kcmp") == 0)
        forbid_kcmp();
    if (count > 1 && strcmp(values[1], "leaderless") == 0) {
        pthread_t thread;
        pthread_create(&thread, NULL, serve, NULL);
        pthread_exit(NULL); /* the thread-group leader is gone, the process lives */
    }
    serve(NULL);
    return 0;
}
