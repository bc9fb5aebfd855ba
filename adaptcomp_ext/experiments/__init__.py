"""The experiments and the command line; they need the optional extras."""
