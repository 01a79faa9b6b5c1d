"""Between text and tokens: prompts, sentence starts, incremental detokenization."""
