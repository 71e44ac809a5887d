# SPDX-License-Identifier: Apache-2.0
"""What can go wrong in the device plugin, as one tree. No module of it raises anything else on purpose.

    PluginError
    ├── StoreError        the ledger's file cannot be read or written
    ├── AgentError        the node agent gave no status
    ├── KubeletError      the kubelet refused us or gave no answer
    └── InstallError      the runtime cannot be put onto the node

Imported by every module here; imports nothing.
"""

from __future__ import annotations


class PluginError(Exception):
    """Root of the tree; the message says what to do."""


class StoreError(PluginError):
    pass


class AgentError(PluginError):
    pass


class KubeletError(PluginError):
    pass


class InstallError(PluginError):
    pass
