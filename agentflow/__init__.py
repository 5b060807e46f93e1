"""What every process of AgentFlow has to agree on: settings, database, jobs, broker, storage, metrics, log."""

__version__ = "0.1.0"

#: How AgentFlow names itself to other servers.
USER_AGENT = f"AgentFlow/{__version__}"
