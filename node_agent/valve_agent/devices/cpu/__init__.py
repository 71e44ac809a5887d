# SPDX-License-Identifier: Apache-2.0
"""The `cpu` device: real processes, real memory, no accelerator."""
