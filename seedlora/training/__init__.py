"""The LightningModule and its parts."""
