"""Tree attention for GPUs: backends, launches and kernels."""
