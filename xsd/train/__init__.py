"""Training: objectives, the adapter trainer with self-rollout, LoRA of the drafter."""
