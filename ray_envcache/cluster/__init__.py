"""What Ray starts: workers, the build process of its agent, and the program under `ray-envcache run`."""
