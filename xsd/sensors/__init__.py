"""What the two sensors saw, and the dataset folder it is kept in (docs/sensors.md)."""
