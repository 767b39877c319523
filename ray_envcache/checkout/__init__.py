"""What lies in a project's folder: lockfiles, sources, git. Runs no uv."""
