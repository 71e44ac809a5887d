# SPDX-License-Identifier: Apache-2.0
"""The operator: what a ColocationPolicy says becomes node settings, DaemonSets, evictions and status.

Level-triggered. kopf's handlers (watch.py) only put what they see into a `World` and mark it dirty; one pure
function, `reconcile.reconcile(world, now)`, says what differs from what should be; `executor.Executor` does
it, by server-side apply, with back-off, and only while this replica holds the Lease. Nothing is remembered
that the next run could not find out again, so a replica may die between any two actions.

Admission (admission.py, pure) is served by every replica.
"""
