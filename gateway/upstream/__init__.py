"""Connections to the backends."""
