"""From logits to an answer: sampling, constraints, drafts and the decode loop."""
