# SPDX-License-Identifier: Apache-2.0
"""A demo on one machine: train a small target and its heads, then compare engines."""
