"""What the Python that runs this is: imported here for ourselves, run by others as `-I -S _identity.py PACKAGES`.

There the package is not, so this imports the standard library and, from the folder PACKAGES, packaging.
"""

from __future__ import annotations

import json
import platform
import sys
import sysconfig
from typing import Any


def identity() -> dict[str, Any]:
    """The fields of `Interpreter`, but for `executable`, of the running one."""
    from packaging import markers, tags  # not before PACKAGES is on the path

    return {
        "implementation": sys.implementation.name,
        "version": platform.python_version(),
        "build": sys.version,
        "soabi": sysconfig.get_config_var("SOABI") or "",
        "tags": [str(tag) for tag in tags.sys_tags()],
        "markers": dict(markers.default_environment()),
    }


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    sys.stdout.write(json.dumps(identity()))
