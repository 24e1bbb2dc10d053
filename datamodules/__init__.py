"""LightningDataModules: rows of a task, as batches for a stack of replicas."""
