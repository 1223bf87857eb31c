"""C kernels for CPUs: their sources, and the library that is compiled of them at first use
(library), and the folder that keeps it (cache)."""
