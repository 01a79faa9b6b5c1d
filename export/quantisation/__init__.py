"""Quantisation of the backbone: int4 (RTN and GPTQ), int8, NF4, and the choice among them."""
