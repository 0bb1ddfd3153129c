# SPDX-License-Identifier: Apache-2.0
"""Attention over a context and a draft tree, and the metadata that tells a backend which rows see which."""
