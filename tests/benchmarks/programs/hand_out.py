"""Build the environment of a project, until it is handed out: `python hand_out.py PROJECT`, as a driver does it."""

from __future__ import annotations

import sys

from ray_envcache.cluster_ray import installed_ray
from ray_envcache.leases import Holder
from ray_envcache.spec import EnvSpec
from ray_envcache.store import Store

if __name__ == "__main__":
    lease = Store.open().acquire(EnvSpec.parse(sys.argv[1]), installed_ray(), Holder("driver"), check_current=True)
    with lease:
        print(lease.python)
