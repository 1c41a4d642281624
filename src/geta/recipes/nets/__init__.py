"""Networks of shipped recipes, as plain PyTorch modules."""
