"""Trainbox: fine-tuning in sealed, reproducible containers."""

__version__ = "0.1.0"
