"""This machine: what is free, how fast it is, and the habits of its devices."""
