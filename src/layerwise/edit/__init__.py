"""Edit: what is done to weights, layers and stacks."""
