"""How fast a bundle is on this machine: `measure` and what it returns."""
