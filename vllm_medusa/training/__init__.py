# SPDX-License-Identifier: Apache-2.0
"""Train Medusa heads, alone (Medusa-1) or together with their target (Medusa-2)."""
