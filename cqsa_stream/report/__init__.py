"""A page about a run: what is told (story), its pictures, and the page itself."""
