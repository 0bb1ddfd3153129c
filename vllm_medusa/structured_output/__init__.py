# SPDX-License-Identifier: Apache-2.0
"""Structured output on trees: a mask for each row, in vLLM's scheduler."""
