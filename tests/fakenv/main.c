/* SPDX-License-Identifier: Apache-2.0
 *
 * fakenv: a fake NVIDIA driver for unmodified programs.
 *
 *   fakenv serve --socket PATH [options]        the machine; prints "ready" when it can be joined
 *   fakenv exec  --socket PATH -- COMMAND ...   becomes COMMAND, under that machine's driver
 *   fakenv run   [options] -- COMMAND ...       both: serves until COMMAND has ended
 *   fakenv ctl   --socket PATH WORD ...         one line of the control protocol (knobs.c)
 *
 * Options: --branch 535 to 595 (branch.c), --driver-version TEXT, --no-driver, --need-nodes, --gpus N,
 * --memory-mib N.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fake.h"

enum { REPLY = 256 * 1024 };
static const char *socket_path;

static void die(const char *what)
{
    fprintf(stderr, "fakenv: %s: %s\n", what, strerror(errno));
    exit(125);
}

static struct sockaddr_un address(void)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    if (!socket_path || strlen(socket_path) >= sizeof a.sun_path) {
        fprintf(stderr, "fakenv: --socket PATH is needed, shorter than %zu bytes\n", sizeof a.sun_path);
        exit(125);
    }
    strcpy(a.sun_path, socket_path);
    return a;
}

/* ---- client side ---- */

/* Sends one line, with a descriptor if fd >= 0, and waits for the answer. */
static void ask(int s, const char *line, int fd, char *reply, size_t bytes)
{
    char space[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec iov = {(void *)(uintptr_t)line, strlen(line)};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        m.msg_control = space;
        m.msg_controllen = sizeof space;
        *CMSG_FIRSTHDR(&m) =
            (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), &fd, sizeof fd);
    }
    ssize_t n;
    if (sendmsg(s, &m, MSG_NOSIGNAL) < 0 || (n = recv(s, reply, bytes - 1, 0)) < 0)
        die("talking to the supervisor");
    reply[n] = 0;
}

static int connect_machine(void)
{
    struct sockaddr_un a = address();
    int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (s < 0 || connect(s, (struct sockaddr *)&a, sizeof a) < 0)
        die(a.sun_path);
    return s;
}

static void become(int s, char **command)
{
    char reply[64];
    int listener = filter_install();
    ask(s, "listener", listener, reply, sizeof reply);
    close(listener);
    execvp(command[0], command);
    die(command[0]);
}

/* ---- server side ---- */

static void *session(void *argument)
{
    int s = (int)(intptr_t)argument;
    char line[512], space[CMSG_SPACE(sizeof(int))];
    char *reply = malloc(REPLY);
    for (;;) {
        struct iovec iov = {line, sizeof line - 1};
        struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
        ssize_t n = recvmsg(s, &m, MSG_CMSG_CLOEXEC);
        if (n <= 0 || !reply)
            break;
        line[n] = 0;
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        if (strcmp(line, "listener") == 0 && c && c->cmsg_type == SCM_RIGHTS) {
            int fd;
            memcpy(&fd, CMSG_DATA(c), sizeof fd);
            notify_serve(fd);
            snprintf(reply, REPLY, "ok");
        } else {
            knobs_execute(line, reply, REPLY);
        }
        if (send(s, reply, strlen(reply), MSG_NOSIGNAL) < 0)
            break;
    }
    free(reply);
    close(s);
    return NULL;
}

static void *accept_loop(void *argument)
{
    int l = (int)(intptr_t)argument;
    for (;;) {
        pthread_t thread;
        int s = accept4(l, NULL, NULL, SOCK_CLOEXEC), size = REPLY;
        if (s < 0)
            continue;
        setsockopt(s, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        if (pthread_create(&thread, NULL, session, (void *)(intptr_t)s))
            abort();
        pthread_detach(thread);
    }
    return NULL;
}

static void serve(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_TIMERSLACK, 1);
    files_start_watch();
    if (!socket_path)
        return;
    struct sockaddr_un a = address();
    pthread_t thread;
    int l = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (l < 0 || bind(l, (struct sockaddr *)&a, sizeof a) < 0 || listen(l, 64) < 0)
        die(a.sun_path);
    if (pthread_create(&thread, NULL, accept_loop, (void *)(intptr_t)l))
        abort();
    pthread_detach(thread);
}

static int run(char **command)
{
    int pair[2], status;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        die("socketpair");
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        close(pair[0]);
        become(pair[1], command);
    }
    close(pair[1]);
    serve();
    pthread_t thread;
    if (pthread_create(&thread, NULL, session, (void *)(intptr_t)pair[0]))
        abort();
    pthread_detach(thread);
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR)
            die("waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static char **options(int argc, char **argv)
{
    const char *version = NULL;
    machine = (struct machine){.branch = branch_named("580"), .driver = true, .gpus = 1, .gpu_bytes = 1ull << 30,
                               .compute_channels = FAKENV_COMPUTE};
    int i = 2;
    for (; i < argc && strncmp(argv[i], "--", 2) == 0; i++) {
        const char *name = argv[i] + 2, *value = i + 1 < argc ? argv[i + 1] : "";
        if (*name == 0) {
            i++;
            break;
        }
        if (strcmp(name, "need-nodes") == 0) {
            machine.need_nodes = true;
            continue;
        }
        if (strcmp(name, "no-driver") == 0) {
            machine.driver = false;
            continue;
        }
        i++;
        if (strcmp(name, "socket") == 0)
            socket_path = value;
        else if (strcmp(name, "branch") == 0)
            machine.branch = branch_named(value);
        else if (strcmp(name, "driver-version") == 0)
            version = value;
        else if (strcmp(name, "gpus") == 0)
            machine.gpus = (unsigned)atoi(value);
        else if (strcmp(name, "memory-mib") == 0)
            machine.gpu_bytes = strtoull(value, NULL, 0) << 20;
        else if (strcmp(name, "compute-channels") == 0)
            machine.compute_channels = (unsigned)atoi(value);
        else
            machine.branch = NULL;
        if (!machine.branch || machine.gpus > FAKENV_MAX_GPUS ||
            machine.compute_channels - 1 >= FAKENV_COMPUTE_MAX) {
            fprintf(stderr, "fakenv: --%s %s is not understood\n", name, value);
            exit(125);
        }
    }
    snprintf(machine.version, sizeof machine.version, "%s", version ? version : machine.branch->version);
    return argv + i;
}

int main(int argc, char **argv)
{
    const char *verb = argc > 1 ? argv[1] : "";
    const char *unavailable = filter_unavailable();
    char **rest = options(argc, argv);
    if (strcmp(verb, "check") == 0) {
        puts(unavailable ? unavailable : "ok");
        return unavailable != NULL;
    }
    if (unavailable) {
        fprintf(stderr, "fakenv: %s\n", unavailable);
        return 125;
    }
    if (strcmp(verb, "serve") == 0) {
        sigset_t set;
        int signal_number;
        sigemptyset(&set);
        sigaddset(&set, SIGTERM);
        sigaddset(&set, SIGINT);
        sigprocmask(SIG_BLOCK, &set, NULL);
        address(); /* --socket is needed */
        serve();
        puts("ready");
        fflush(stdout);
        sigwait(&set, &signal_number);
        unlink(socket_path);
        return 0;
    }
    if (strcmp(verb, "ctl") == 0 && *rest) {
        static char reply[REPLY];
        char line[512] = "";
        for (; *rest; rest++)
            snprintf(line + strlen(line), sizeof line - strlen(line), "%s ", *rest);
        ask(connect_machine(), line, -1, reply, sizeof reply);
        puts(reply);
        return strncmp(reply, "error", 5) == 0;
    }
    if (strcmp(verb, "exec") == 0 && *rest)
        become(connect_machine(), rest);
    if (strcmp(verb, "run") == 0 && *rest)
        return run(rest);
    fputs("usage: fakenv serve|exec|run|ctl|check [--socket PATH] [options] [--] [COMMAND ...]\n", stderr);
    return 125;
}
