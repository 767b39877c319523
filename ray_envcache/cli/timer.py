"""What `gc --print-timer` prints: a crontab line, and a systemd timer, for the store and the limits of this shell."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping

from ray_envcache.gc.policy import VARIABLES
from ray_envcache.store.layout import default_root

TIMER = """\
# crontab -e: every hour, quiet unless something fails
17 * * * * {in_cron} gc > /dev/null # ray-envcache-gc

# or systemd, as the store's user:
#   mkdir -p ~/.config/systemd/user, save the two files there, then
#   systemctl --user daemon-reload && systemctl --user enable --now ray-envcache-gc.timer
#   (loginctl enable-linger keeps it running while you are logged out)

# ~/.config/systemd/user/ray-envcache-gc.service
[Unit]
Description=Remove unused Ray environments

[Service]
Type=oneshot
{variables}ExecStart={in_systemd} gc
Nice=10
IOSchedulingClass=idle

# ~/.config/systemd/user/ray-envcache-gc.timer
[Unit]
Description=Remove unused Ray environments every hour

[Timer]
OnCalendar=hourly
RandomizedDelaySec=10m
Persistent=true

[Install]
WantedBy=timers.target"""


def timer(environ: Mapping[str, str]) -> str:
    """The text, with the full path of this command and the settings in `environ`: cron and systemd have neither."""
    script = os.path.abspath(sys.argv[0])
    command = [script] if os.path.basename(script) == "ray-envcache" else [sys.executable, "-m", "ray_envcache"]
    names = ("RAY_ENVCACHE_ALLOW_NETWORK_FS", *VARIABLES)
    variables = {name: environ[name] for name in names if name in environ}
    # The default depends on variables of the shell too, such as XDG_CACHE_HOME: so it is always spelled out.
    variables["RAY_ENVCACHE_DIR"] = os.fspath(default_root())
    chosen = [f"{name}={value}" for name, value in sorted(variables.items())]
    # Cron ends a line at a %, and systemd replaces what follows one. Both take quotes; systemd no others than these.
    in_cron = shlex.join(["env", *chosen, *command]).replace("%", "\\%")
    in_systemd = " ".join(_quoted(word.replace("$", "$$")) for word in command)
    lines = "".join(f"Environment={_quoted(one)}\n" for one in chosen)
    return TIMER.format(in_cron=in_cron, in_systemd=in_systemd, variables=lines)


def _quoted(word: str) -> str:
    """A word as systemd reads it."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return word if escaped == word and word.isascii() and not set(word) & set(" '\t") else f'"{escaped}"'
