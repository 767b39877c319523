"""`python -m ray_envcache` is `ray-envcache`."""

from ray_envcache.cli.main import main

if __name__ == "__main__":
    main()
