"""What ops/bench/compare.py consists of: private servers, trials of one system with one workload, and the report."""
