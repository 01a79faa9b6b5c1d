"""Training and exporting (torch)."""
