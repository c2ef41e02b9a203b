"""The models: one file per architecture, and what they share."""
