# SPDX-License-Identifier: Apache-2.0
"""The kubelet's gRPC APIs as Valve speaks them: messages generated from deviceplugin/proto, calls by hand."""
