"""The rows of one step, derived from drafts."""
