"""The request splitter: what it is trained on, its network, its training."""
