"""What people run: command line, demo, traces, reports."""
