"""A run on disk: its directory, its state, what is refused, and the session that computes it."""
