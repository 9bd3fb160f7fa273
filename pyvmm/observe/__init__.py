"""What can be seen of a run: counters, and what the kernel's own tracing tells."""
