"""The decoding engine: autoregressive, speculative with prefill hiding, its certificate and replay;
any handle, no tokenizer, no file."""
