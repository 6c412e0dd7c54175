"""A run: options, loop, state, folder, reports."""
