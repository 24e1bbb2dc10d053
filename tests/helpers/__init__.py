"""What several test files need: models, runs, references, and what they are compared by."""
