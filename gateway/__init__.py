"""Joins policies, discovery and observability, and moves the bytes."""
