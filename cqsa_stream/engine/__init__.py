"""The inner loop, what feeds it, and where its results leave. It knows tasks, kernels and stores, and no files."""
