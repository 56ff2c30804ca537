"""The decoding engine: any handle, no tokenizer, no file (docs/decoding.md)."""
