"""What a plan holds, moves and takes. Pure arithmetic."""
