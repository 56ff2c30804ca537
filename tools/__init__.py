"""What keeps the checkout in order: the environment, the committed notebooks and their pictures."""
