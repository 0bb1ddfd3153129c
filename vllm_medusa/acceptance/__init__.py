"""Which of a tree's rows are kept."""
