# SPDX-License-Identifier: Apache-2.0
"""Which of a tree's rows are kept."""
