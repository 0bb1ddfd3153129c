# SPDX-License-Identifier: Apache-2.0
"""The heads' checkpoint: its format, the published layouts, and conversion between them."""
