"""Processes and shards on torch.distributed."""
