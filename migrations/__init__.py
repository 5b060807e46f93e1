"""Numbered plain SQL, forward only, and the runner that applies it: `python -m migrations`."""
