"""Text handling: prompts, sentence boundaries, incremental detokenization."""
