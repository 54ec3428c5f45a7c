"""Nodes of a run: what starts and watches processes."""
