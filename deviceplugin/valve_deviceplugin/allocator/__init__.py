# SPDX-License-Identifier: Apache-2.0
"""Which container uses which GPU, and how much of it: pure decisions and the book of what was decided.

Nothing here knows gRPC, files or clocks; time is an argument. `ledger`, `placement` and `lending` know
nothing of device ids either, so that a DRA driver can use them with claims for tokens; `units` is what the
device plugin API needs on top.
"""
