"""What the tests share: tiny models, oracles, servers, faults."""
