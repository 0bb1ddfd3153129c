# SPDX-License-Identifier: Apache-2.0
"""Measure the heads' accuracies and calibrate trees from them."""
