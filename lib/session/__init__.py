"""Session folders, atomic file writes, logging, metrics and TensorBoard."""
