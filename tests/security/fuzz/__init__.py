"""The fuzzer: seeds, mutations and targets."""
