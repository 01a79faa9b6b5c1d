"""Adding adapters to a loaded bundle and removing them."""
