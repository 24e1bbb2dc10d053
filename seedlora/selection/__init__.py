"""Choose among ways to fuse on validation rows, and what a run compares."""
