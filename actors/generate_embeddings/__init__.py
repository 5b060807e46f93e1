"""Files into the knowledge base: `job` is the worker's side, `child` and what it uses run in the child process (keep this file
light)."""
