"""How much is accepted, and what a reader may believe of it: hidden-state and token metrics,
floors, intervals, speed-up models (docs/metrics.md)."""
