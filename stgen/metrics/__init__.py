"""Numbers about clips: distances between sets of clips, what changes within one, and the features both are read from."""
