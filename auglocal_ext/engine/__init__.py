"""A local module as a list of nodes, its training step as a list of instructions, and what that list holds."""
