"""A run: its options, folder, budget, memory, cost and plan."""
