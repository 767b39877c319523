"""Build the environment of a project, until it is handed out: `python hand_out.py PROJECT`, as a driver does it."""

from __future__ import annotations

import sys

from ray_envcache.acquire import Store
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder

if __name__ == "__main__":
    lease = Store.open().acquire(EnvSpec.parse(sys.argv[1]), installed_ray(), Holder("driver"), check_current=True)
    with lease:
        print(lease.python)
