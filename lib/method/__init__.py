"""The paper: memory bank, discovery, loss."""
