"""What any JAX job needs: settings and messages, files, devices, hosts. Knows nothing of raters."""
