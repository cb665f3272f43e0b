"""The state of a store: plain data with rules, without I/O."""
