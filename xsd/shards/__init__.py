"""Paired hidden states on disk: ragged safetensors with a manifest, written safely, read by index
or in shuffled batches."""
