"""How often heads are right, and the trees that follow from it."""
