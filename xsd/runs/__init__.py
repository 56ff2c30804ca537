"""Typed parameters, running and sweeping notebooks, their committed form, and the offline
report."""
