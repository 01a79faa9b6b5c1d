"""The bundle format."""
