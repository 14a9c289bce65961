"""``python -m cqsa_stream``: the command line."""

from cqsa_stream.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
