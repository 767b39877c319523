"""What runs in the environments' own Pythons, which do not have this package: the standard library only."""
