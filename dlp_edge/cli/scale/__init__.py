"""Past one machine: `front` and `convert`."""
