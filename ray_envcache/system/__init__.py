"""What the operating system gives: files, flocks, disks, processes. Knows no store."""
