"""Time: what is timed, who is timed beside it, the host's part, tiles."""
