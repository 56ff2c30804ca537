"""What the two sensors saw: event streams, event frames, video frames, the dataset folder, raw
DSEC."""
