"""Models saved to files, and restored from them."""
