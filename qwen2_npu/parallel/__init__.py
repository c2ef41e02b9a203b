"""One model on several cards, one process per card: what is cut where, and how the parts talk to each other."""
