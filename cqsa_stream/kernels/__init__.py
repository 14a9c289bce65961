"""Exact attention of one tile on one device: one contract, one back end a file."""
