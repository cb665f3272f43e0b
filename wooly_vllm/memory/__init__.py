"""What vLLM is told of memory that is shared."""
