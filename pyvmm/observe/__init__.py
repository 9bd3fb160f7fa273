"""What can be seen of a run: counters, page maps, timelines, and what the kernel's own tracing tells."""
