"""What an operator should hear of: one table of alerts (table.py), as rules for Prometheus (prometheus.py), and as the scheduler
raises them by itself where there is no Prometheus (standing.py, telling.py)."""
