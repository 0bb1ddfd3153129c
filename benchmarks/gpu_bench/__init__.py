# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks/gpu.py`` is made of."""
