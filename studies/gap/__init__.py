"""Where acceptance is lost, and what the events are worth (notebook 13)."""
