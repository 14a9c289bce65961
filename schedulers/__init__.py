"""Deciding order: how attention is cut into chunks, pairs and tasks, and what that costs. Pure Python, no I/O."""
