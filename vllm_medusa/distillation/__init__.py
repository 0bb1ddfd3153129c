"""Self-distillation: the target writes the training set of its heads."""
