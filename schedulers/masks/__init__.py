"""Masks as lists of disjoint bands: one mask a file."""
