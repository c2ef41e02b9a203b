"""The attention operators, a file each, over two cores: `prefill` (many queries) and `decode` (one per row)."""
