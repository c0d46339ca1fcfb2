"""Training: the loop and all that it needs, up to an exact resume."""
