"""The merge rules, one file for each family."""
