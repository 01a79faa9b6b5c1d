"""Task samples, as files of {"prompt", "response", "choices"?} a line."""
