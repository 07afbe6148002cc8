"""Knows which backends exist and which of them are healthy."""
