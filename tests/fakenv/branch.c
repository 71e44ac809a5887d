/* SPDX-License-Identifier: Apache-2.0 */
#include "branch.h"

#include <string.h>

const struct branch branches[] = {
    {"535", "535.288.01", 360, 48, 120, 2, 256, 132, 32},
    {"550", "550.163.01", 360, 48, 128, 2, 256, 132, 256},
    {"560", "560.35.03", 360, 48, 128, 2, 256, 132, 256},
    {"565", "565.77", 360, 48, 128, 2, 256, 132, 256},
    {"570", "570.211.01", 368, 48, 128, 2, 256, 132, 256},
    {"575", "575.64.05", 368, 48, 128, 3, 256, 132, 256},
    {"580", "580.142", 368, 56, 128, 3, 384, 132, 256},
    {"590", "590.48.01", 368, 56, 128, 3, 384, 132, 256},
    {"595", "595.45.04", 368, 56, 128, 3, 384, 68, 256},
};
const unsigned branch_count = sizeof branches / sizeof branches[0];

const struct branch *branch_named(const char *name)
{
    for (unsigned i = 0; i < branch_count; i++)
        if (strcmp(branches[i].name, name) == 0)
            return &branches[i];
    return NULL;
}

const struct branch *branch_of_version(const char *version)
{
    for (unsigned i = 0; i < branch_count; i++)
        if (strncmp(branches[i].name, version, 3) == 0 && version[3] == '.')
            return &branches[i];
    return NULL;
}
