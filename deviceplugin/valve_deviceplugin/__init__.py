# SPDX-License-Identifier: Apache-2.0
"""The device plugin: online seats and offline memory for the scheduler, the runtime for the containers."""
