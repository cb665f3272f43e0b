"""Shared weights that leave the device and return: sleep and wake."""
