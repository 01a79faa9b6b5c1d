"""What users touch: CLI, server, demo, desktop example, evaluation, packages, docs."""
