"""Paired hidden states on disk: ragged safetensors with a manifest (docs/shards.md)."""
