"""The verbs of `dlp-edge`, a file each: arguments in `add`, work in `run`."""
