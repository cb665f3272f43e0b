"""Transfers of whole models between device memory and files, and verification of resident models.

Runs in clients of the store and needs no torch: the command line and the engines use the same code, for host memory
and for GPUs.
"""
