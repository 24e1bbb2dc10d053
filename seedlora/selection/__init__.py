"""Compare merge rules and controls on validation rows, and choose among them."""
