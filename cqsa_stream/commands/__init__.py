"""The commands of the command line, what their options are and how they speak."""
