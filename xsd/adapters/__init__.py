"""Adapters: from the drafter's hidden states to the verifier's, every level of the reference,
closed forms, and one registry."""
