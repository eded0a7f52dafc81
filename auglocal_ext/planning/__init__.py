"""What a training step will hold and cost, before it runs, and which cut fits a memory budget."""
