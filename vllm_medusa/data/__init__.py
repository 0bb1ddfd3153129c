"""Records of text and conversations, as tokens."""
