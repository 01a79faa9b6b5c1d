"""The runtime on bundles: parity with PEFT, sessions, batches, threads, faults."""
