"""Is it set up? This host, and every node of a cluster. And what mends a damaged entry."""
