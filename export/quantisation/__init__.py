"""From a dense graph to whole-number weights: int8, int4 (GPTQ or an existing grid), nf4."""
