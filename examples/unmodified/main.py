"""To be started with `ray-envcache run -- python main.py`."""

import framework

if __name__ == "__main__":
    framework.main()
