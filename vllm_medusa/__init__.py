# SPDX-License-Identifier: Apache-2.0
"""Medusa heads and draft trees for stock vLLM."""

__version__ = "0.1.0"
