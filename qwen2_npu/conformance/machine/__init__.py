"""Who measured: software, device, what a card can do, and the archive for a bug report."""
