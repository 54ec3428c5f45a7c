"""Rendezvous, leases and scaling on virtual time: thousands of lives of a job in a minute (job.py, schedules.py)."""
