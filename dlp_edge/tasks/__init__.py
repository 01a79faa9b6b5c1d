"""Task samples: JSON Lines files of {"prompt", "response", "choices"?}."""
