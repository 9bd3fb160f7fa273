"""vCPUs as threads: running, pausing, kicking them, and what a cold exit means."""
