"""An OpenAI-compatible front over vLLM servers (`dlp-edge front`): routes at every sentence."""
