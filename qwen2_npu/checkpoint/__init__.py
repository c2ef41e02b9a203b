"""Checkpoint folders: configuration, tensors and tokenizer, read with every fault named, and written in one step."""
