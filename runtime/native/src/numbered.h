/* SPDX-License-Identifier: Apache-2.0
 *
 * Sixty-four numbered functions, for a name that has several real functions behind it: what is
 * handed out instead of a real one is the wrapper whose number stands for it.  To be included
 * once, after
 *
 *     #define PARAMETERS long a, ...      what each of them takes, and
 *     #define ARGUMENTS a, ...            passes on to
 *     static int through(uint32_t number, PARAMETERS);
 *
 * Every argument of the functions wrapped is an integer or a pointer; passing on more than there
 * are is harmless in both calling conventions.
 */
#define WRAPPER(n) \
    static int wrapper_##n(PARAMETERS) { return through(n, ARGUMENTS); }
#define EIGHT(m, t) m(t##0) m(t##1) m(t##2) m(t##3) m(t##4) m(t##5) m(t##6) m(t##7)
#define ALL(m) EIGHT(m, 0) EIGHT(m, 01) EIGHT(m, 02) EIGHT(m, 03) EIGHT(m, 04) EIGHT(m, 05) EIGHT(m, 06) EIGHT(m, 07)
ALL(WRAPPER) /* octal: 00 ... 077 */
#define NAME(n) wrapper_##n,
static int (*const wrappers[WRAPPERS])(PARAMETERS) = {ALL(NAME)};
