"""The same skills for vLLM: `export --to vllm` and `convert --to vllm`."""
