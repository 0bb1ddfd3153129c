# SPDX-License-Identifier: Apache-2.0
"""The rows of one step, derived from drafts."""
