"""What becomes of a webhook: `job` is told of an event, and a small module for each kind of action does it."""
