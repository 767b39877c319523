"""What the Python that runs this is: each is asked as `python -I -S identity.py PACKAGES`.

There the package is not, so this imports the standard library and, from the folder PACKAGES, packaging.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from typing import Any


def identity() -> dict[str, Any]:
    """The fields of `Interpreter`, but for `executable`, of the running one."""
    from packaging import markers, tags  # not before PACKAGES is on the path

    # Not platform.python_version(): that of a build from a checkout is "3.12.7+", which is no version.
    version = ".".join(map(str, sys.version_info[:3]))
    return {
        "implementation": sys.implementation.name,
        "version": version,
        "build": sys.version,
        "soabi": sysconfig.get_config_var("SOABI") or "",
        "tags": [str(tag) for tag in tags.sys_tags()],
        "markers": {**markers.default_environment(), "python_full_version": version},
    }


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    sys.stdout.write(json.dumps(identity()))
