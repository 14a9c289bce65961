"""What is computed of the pairs: one operation a file. The engine knows their streams and sums, nothing else."""
