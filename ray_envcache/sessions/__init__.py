"""Ray's session directories and short temp paths. Knows no store."""
