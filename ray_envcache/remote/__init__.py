"""The remote tier: environments in object storage, as wheels that uv installs, published once for all hosts."""
