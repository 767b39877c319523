#!/bin/sh
# A script as projects have them. Below `ray-envcache run` its `uv run` is in the shared environment, and makes no .venv.
set -eu
uv run python main.py
