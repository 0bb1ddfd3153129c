"""Medusa heads and draft trees for stock vLLM."""
