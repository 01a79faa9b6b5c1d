"""Bundles on the Hugging Face hub and on web servers: fetching and publishing."""
