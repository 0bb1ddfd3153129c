# SPDX-License-Identifier: Apache-2.0
"""Tree attention for GPUs: backends, launches and kernels."""
