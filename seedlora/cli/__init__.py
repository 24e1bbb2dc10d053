"""The command lines: train.py, and ``python -m seedlora``."""
