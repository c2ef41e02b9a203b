"""One model on several cards: one process per card (docs/parallel.md)."""
