"""What goes wrong for a user, as exceptions whose message names the thing, the value and the way out."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint folder, or something in it, cannot be used."""


class CacheOverflowError(ValueError):
    """More tokens than the KV cache holds. Raised before anything is written."""


class UnsupportedError(ValueError):
    """A configuration or an argument that this model does not serve, with the one that it does."""
