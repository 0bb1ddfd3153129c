# SPDX-License-Identifier: Apache-2.0
"""How many of the drafted nodes are worth a row of the next step."""
