"""Similarity, statistics and quality metrics."""
