"""The bundle format: its files, how they are checked, and how they change. Imports no `runtime`."""
