# SPDX-License-Identifier: Apache-2.0
"""The exceptions of the test cluster; every message says what to do next.

ClusterError
├── BuildError      a binary or an image could not be made
├── MissingError    this machine lacks something (a package, a capability); names it
└── StartError      a process of the cluster did not become ready; carries the tail of its log
"""

from __future__ import annotations


class ClusterError(Exception):
    """Base of everything e2e.cluster raises."""


class BuildError(ClusterError):
    """A binary or an image could not be made."""


class MissingError(ClusterError):
    """This machine lacks something the cluster needs."""


class StartError(ClusterError):
    """A process of the cluster did not become ready."""
