# SPDX-License-Identifier: Apache-2.0
"""What a real GPU must still tell us: questions E1 to E16 and the benches of the `nvidia` device.

Runs with the system's Python and its standard library, on a machine that has nothing else but nvcc (torch and
transformers for `serving`). It uses the product's own code: libvalve, the gate process, the routes. See
docs/gpu.md; started by e2e/gpu/qualify.py.
"""
