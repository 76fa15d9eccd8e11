"""impl="triton", the host side: which kernels and products run, in which order, on which memory."""
