"""Self-distillation: the target writes the training set for its heads."""
