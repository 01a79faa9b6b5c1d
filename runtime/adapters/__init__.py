"""Add adapters to a bundle and remove them."""
