"""Reading token arrays, and what readers share."""
