"""EventGPT as a transformers model, the loading of both models, and the decoder handle over a KV
cache (docs/models.md)."""
