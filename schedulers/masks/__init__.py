"""Masks as lists of disjoint bands: bands, their kernel calls, and a file for each mask."""
