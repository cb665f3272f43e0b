"""The soak: clients that publish, read and die at random, and an exact count of the rest."""
