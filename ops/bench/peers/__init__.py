"""What the comparison measures: one module for each system, with its job and how a producer hands it in; their settings are
in `catalogue`. They run in an environment of their own (`requirements.txt`), AgentFlow in its own.
"""
