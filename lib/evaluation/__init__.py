"""Evaluation of embeddings: weighted kNN, linear probe, clustering."""
