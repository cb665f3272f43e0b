"""Recovery after a restart: models that the keeper retained, and models that clients offer."""
