# SPDX-License-Identifier: Apache-2.0
"""A made-up tree of a driver, with no more in it than the patch program reads. Written for these tests;
only the names that the program looks for are the real driver's."""

from __future__ import annotations

from pathlib import Path

CLIENT = Path("src/nvidia/src/kernel/rmapi/client.c")
ESCAPE = Path("src/nvidia/arch/nvalloc/unix/src/escape.c")
LEVELS = Path("src/common/sdk/nvidia/inc/nvsecurityinfo.h")

VALIDATE = """\
/* A comment that says rmclientValidate_IMPL(x) { and does not count. */
static const char *decoy = "rmclientValidate_IMPL() { if (a->pOSInfo != b->clientOSInfo)";
NV_STATUS rmclientValidate_IMPL(RmClient *pClient, const API_SECURITY_INFO *pSecInfo);

#define SOMETHING(x) \\
    do { if (x) { call(x); } } while (0)

int other(void)
{
    return rmclientValidate_IMPL(one, two) == 0 ? '{' : '}';
}

NV_STATUS
rmclientValidate_IMPL
(
    RmClient *pClient,
    const API_SECURITY_INFO *pSecInfo
)
{
    NV_STATUS status = NV_OK;

    if (enabled(PDB_PROP_SYS_VALIDATE_CLIENT_HANDLE) && pSecInfo != NULL)
    {
        if (enabled(pSys, PDB_PROP_SYS_VALIDATE_CLIENT_HANDLE_STRICT) &&
            pSecInfo->clientOSInfo != NULL)
        {
            if (pClient->pOSInfo != pSecInfo->clientOSInfo)
            {
                status = NV_ERR_INVALID_CLIENT; // not the file that made it
            }
        }
        else if (pSecInfo->privLevel < RS_PRIV_LEVEL_KERNEL)
        {
            status = _rmclientUserClientSecurityCheck(pClient, pSecInfo);
        }
    }
    return status;
}
"""
ESCAPES = """\
NV_STATUS RmIoctl(nv_state_t *nv, void *data)
{
    API_SECURITY_INFO secInfo = { };
    secInfo.privLevel = osIsAdministrator() ? RS_PRIV_LEVEL_USER_ROOT : RS_PRIV_LEVEL_USER;
    return dispatch(&secInfo, data);
}
"""
ENUM = "typedef enum { RS_PRIV_LEVEL_USER, RS_PRIV_LEVEL_USER_ROOT, RS_PRIV_LEVEL_KERNEL } LEVEL;\n"


def write_tree(folder: Path, version: str = "580.142", **files: str) -> Path:
    """A tree in `folder`; `client`, `escape` and `levels` replace the files of these names."""
    for path, text in (
        (Path("version.mk"), f"# made up\nNVIDIA_VERSION = {version}\nNVIDIA_NVID_EXTRA =\n"),
        (CLIENT, files.get("client", VALIDATE)),
        (ESCAPE, files.get("escape", ESCAPES)),
        (LEVELS, files.get("levels", ENUM)),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, newline="")
    return folder
