"""The heads' checkpoint: format, published layouts, conversion."""
