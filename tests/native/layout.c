/* SPDX-License-Identifier: Apache-2.0
 * Prints what the compiler makes of valve_protocol.h: "struct size" and "struct.field
 * offset size" lines, and "constant value" lines. */
#include "valve.h"
#include "valve_protocol.h"

#include <stddef.h>
#include <stdio.h>

#define STRUCT(name) printf("%s %zu\n", #name, sizeof(struct valve_##name))
#define FIELD(name, field)                                                    \
    printf("%s.%s %zu %zu\n", #name, #field, offsetof(struct valve_##name, field), \
           sizeof(((struct valve_##name *)0)->field))
#define CONSTANT(name) printf("%s %llu\n", #name, (unsigned long long)(name))

int main(void)
{
    /* The list of what to print is made from the header by the test. */
#include "layout.inc"
    return 0;
}
