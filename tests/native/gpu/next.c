/* SPDX-License-Identifier: Apache-2.0
 *
 * Three pieces in one file.  FIRST and SECOND are libraries that both define `marker`; a call of dlsym with
 * RTLD_NEXT from FIRST must find SECOND's, whoever stands in front of dlsym. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>

#if defined(FIRST)
int marker(void) { return 1; }
int next_marker(void)
{
    int (*next)(void) = (int (*)(void))dlsym(RTLD_NEXT, "marker");
    return next ? next() : -1;
}
#elif defined(SECOND)
int marker(void) { return 2; }
int second(void) { return 2; }
#else
int next_marker(void);
int second(void);
int main(void)
{
    printf("%d %d\n", next_marker(), second());
    return 0;
}
#endif
