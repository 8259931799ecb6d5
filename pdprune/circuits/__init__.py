"""Which nodes are needed, and the proof."""
