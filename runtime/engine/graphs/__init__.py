"""The backbone's graph, rewritten for an operator, a device or a kind of pass."""
