"""Every level by recipe and seed (notebook 12)."""
