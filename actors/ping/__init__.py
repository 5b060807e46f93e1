"""The canary: `job` is the worker's side, `native` runs in the child process."""
