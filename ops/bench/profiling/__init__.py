"""What ops/bench/profiles.py is made of: who used how much of a processor, samples of where, and a CRM account of its own."""
