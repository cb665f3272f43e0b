"""The parity matrix: stock vLLM, a publisher and a reader compared over models, formats and types."""
