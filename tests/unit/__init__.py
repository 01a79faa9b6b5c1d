"""Parts on their own: no bundle is loaded, no torch imported."""
