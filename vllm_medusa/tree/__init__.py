# SPDX-License-Identifier: Apache-2.0
"""Draft trees: their shape, the ways to choose one, and batches of them."""
