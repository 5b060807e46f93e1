"""The declarations of commands, a module for each subject: names, options and help. What they do is in `agentflow.cli`, and
imported when a command runs: at the top of these modules only click may be, so that `agentflow --help` answers at once.
"""
