"""What happened when: kernels, operators, host calls, gaps and their causes."""
