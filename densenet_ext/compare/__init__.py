"""Fused and unfused training side by side."""
