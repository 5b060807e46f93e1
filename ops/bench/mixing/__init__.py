"""The parts of ops/bench/mix.py."""
