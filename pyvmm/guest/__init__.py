"""Python handles on a running payload: the puppet."""
