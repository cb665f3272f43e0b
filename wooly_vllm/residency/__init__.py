"""Memory of engines that leaves the device and returns: sleep and wake, and swaps."""
