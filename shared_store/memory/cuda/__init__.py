"""What needs CUDA's compiler or CuPy: digests of memory on a GPU. Nothing here is imported without a GPU in use."""
