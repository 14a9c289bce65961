"""Reading token arrays: one format a file."""
