# SPDX-License-Identifier: Apache-2.0
"""The `nvidia` device: channel control through the resource manager (RM), memory through UVM and CUDA VMM."""
