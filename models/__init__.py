"""What is computed, and its files. No sockets, no clocks, no processes."""
