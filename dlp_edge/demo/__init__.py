"""The demo: its adapters, its router, and the steps that turn them into a bundle."""
