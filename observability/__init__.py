"""Hears what happened and shows it: metrics, traces, logs."""
