"""Draft trees: their shape, the ways to choose one, and batches of them."""
