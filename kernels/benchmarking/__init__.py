"""What `kernels/bench.py` times: cases by op, how they are timed, and how results are kept."""
