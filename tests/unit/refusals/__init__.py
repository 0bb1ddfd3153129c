# SPDX-License-Identifier: Apache-2.0
"""Every wrong input that is known, and the one line that it gets; ``docs/errors.md`` is written from these cases."""
