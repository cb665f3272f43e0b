"""Device memory of engines with shared weights: its accounting, and writes that it refuses."""
