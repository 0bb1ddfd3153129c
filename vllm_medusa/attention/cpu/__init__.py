# SPDX-License-Identifier: Apache-2.0
"""Tree attention for CPUs: the backend, and the two ways in which it attends for trees."""
