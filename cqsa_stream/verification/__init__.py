"""Checking results against float64, by what masks and scores are defined to be, and nothing that computed them."""
