"""Rounds, epochs and steps, and the checkpoints that they leave."""
