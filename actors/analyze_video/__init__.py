"""Video analysis: `job` is the worker's side, `analysis` and what it uses run in the child process (keep this file light)."""
