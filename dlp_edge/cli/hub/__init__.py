"""The verbs that fetch and publish bundles, a file each, as in `cli/verbs`."""
