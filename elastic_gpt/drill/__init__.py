"""Proof: nodes killed and added on purpose, and what that changed."""
