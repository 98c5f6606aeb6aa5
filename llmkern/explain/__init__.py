"""Why the joules went where they went: kinds of kernels, causes of gaps."""
