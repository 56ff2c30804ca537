"""Both models, their loading, and the decoder handle over a KV cache (docs/models.md)."""
