# SPDX-License-Identifier: Apache-2.0
"""Moving the accepted rows' keys and values behind the root."""
