# SPDX-License-Identifier: Apache-2.0
"""Records of text and conversations, as tokens."""
