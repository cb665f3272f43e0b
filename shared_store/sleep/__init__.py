"""Sleep and wake: a process leaves a model's device for a host copy, and returns to the same addresses."""
