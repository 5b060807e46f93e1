"""`python -m agentflow.cli`: the same as `agentflow`."""

from agentflow.cli import main

main()
