# SPDX-License-Identifier: Apache-2.0
"""Everything that reaches into vLLM: names, the version guard, every patch, and the list of touched symbols."""
