"""The heads' checkpoint: its format, the published layouts, and conversion between them."""
