"""Bases of datasets, and decoding of image files."""
