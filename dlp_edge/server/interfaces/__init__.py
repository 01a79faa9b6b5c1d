"""OpenAI's interfaces: each reads a request, and writes what is sent of the answer."""
