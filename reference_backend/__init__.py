"""A small OpenAI-compatible inference server on PyTorch: real answers for the gateway to stand in front of."""
