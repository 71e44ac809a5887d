/* SPDX-License-Identifier: Apache-2.0
 *
 * Two pieces in one file.  LIBRARY is a library whose constructor waits for a thread that works on files, as
 * some runtimes do; the program loads it with dlopen, which holds the dynamic loader's lock meanwhile. */
#include <stdio.h>

#ifdef LIBRARY
#include <fcntl.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void *work(void *nothing)
{
    int copy = dup(1), waiting = 0, file = open("/dev/null", O_RDWR);
    ioctl(copy, FIONREAD, &waiting);
    dup2(copy, file);
    fcntl(copy, F_GETFD);
    close_range((unsigned)file, (unsigned)file, 0);
    close(copy);
    return nothing;
}

__attribute__((constructor)) static void begin(void)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, NULL) == 0)
        pthread_join(thread, NULL);
}
#else
#include <dlfcn.h>

int main(int count, char **arguments)
{
    puts(count == 2 && dlopen(arguments[1], RTLD_NOW) ? "loaded" : "failed");
    return 0;
}
#endif
