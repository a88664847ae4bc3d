"""Augmented batches."""
