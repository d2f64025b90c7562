"""The attacks, one a file, from its settings to its loop. `spat_kernels` hands on their public names."""
