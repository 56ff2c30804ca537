"""Measurements of this project's own rooms against plain alternatives, as ratios of one run.
Scripts over xsd, no part of it."""
