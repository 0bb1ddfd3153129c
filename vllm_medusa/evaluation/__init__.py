"""Measure the heads' accuracies and calibrate trees from them."""
