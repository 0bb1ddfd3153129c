# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: the target writes the training set for its heads."""
