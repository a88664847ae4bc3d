"""Augmentation and batching."""
