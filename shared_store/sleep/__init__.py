"""Sleep and wake: host copies of a model that its readers leave on the device for a while."""
