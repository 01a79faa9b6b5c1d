"""Which adapters write a sentence: the router, its input, and the selection rule (eq. 4, 5)."""
