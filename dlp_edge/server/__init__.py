"""An OpenAI-compatible HTTP server around a Runtime (`dlp-edge serve`)."""
