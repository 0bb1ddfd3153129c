# SPDX-License-Identifier: Apache-2.0
"""A race of engines on one machine: stock vLLM and draft trees answer the same questions with a real chat model."""
