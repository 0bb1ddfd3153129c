"""Train Medusa heads, alone (Medusa-1) or together with their target (Medusa-2)."""
