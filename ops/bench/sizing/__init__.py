"""What ops/bench/capacity.py counts with: figures, and what a load needs and costs."""
