"""From samples and a loaded pair to shards of paired hidden states, resumable."""
