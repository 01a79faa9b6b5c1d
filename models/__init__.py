"""What is known of models: backbone architectures, router networks and their training."""
