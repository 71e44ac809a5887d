/* SPDX-License-Identifier: Apache-2.0
 *
 * Makes the engine plugins importable without taking anything away.  A launcher can put
 * a folder in front of PYTHONPATH; what starts containers cannot, for a PYTHONPATH that
 * it sets replaces the image's own.  So it sets VALVE_PYTHONPATH, and every process puts
 * that in front of what it has, before its main() and so before an interpreter looks.
 */
#include "state.h"

#include <stdlib.h>
#include <string.h>

static int has_entry(const char *list, const char *entry)
{
    size_t length = strlen(entry);
    for (const char *at = list; at != NULL; at = strchr(at, ':') ? strchr(at, ':') + 1 : NULL)
        if (strncmp(at, entry, length) == 0 && (at[length] == ':' || at[length] == 0))
            return 1;
    return 0;
}

/* Called by the constructor only: one thread, nobody else reads the environment. */
void valve_python_path(const char *folder)
{
    const char *before = secure_getenv("PYTHONPATH");
    if (folder == NULL || *folder == 0 || (before != NULL && has_entry(before, folder)))
        return;
    if (before == NULL || *before == 0) {
        setenv("PYTHONPATH", folder, 1);
        return;
    }
    size_t bytes = strlen(folder) + 1 + strlen(before) + 1;
    char *both = malloc(bytes);
    if (both == NULL)
        return;
    strcpy(both, folder);
    strcat(both, ":");
    strcat(both, before);
    setenv("PYTHONPATH", both, 1);
    free(both);
}
