"""Training: the local step, and the loop around it."""
