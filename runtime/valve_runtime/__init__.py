# SPDX-License-Identifier: Apache-2.0
"""What Valve runs inside engine processes: one module per engine, no dependencies of its own."""
