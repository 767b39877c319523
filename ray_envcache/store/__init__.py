"""What lies on the disk, and who claims it."""
