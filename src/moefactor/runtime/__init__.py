"""Compressed experts inside inference engines."""
