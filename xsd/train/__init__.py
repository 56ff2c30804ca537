"""Training: objectives, the adapter trainer, self-rollout, and the training of the embedded
pair."""
