"""The field from a notebook. Jupytext, VS Code and PyCharm show this file as cells; `python notebook.py` runs them all.

The kernel needs ray and ray-envcache. What workers need is in the project's lockfile: `uv lock` in ../project first.
"""

# %% [markdown]
# A cluster whose tasks run in the project's environment. Paths are those of the notebook's folder.

# %%
import ray

import ray_envcache

ray.init("local", runtime_env={"envcache": "../project/pyproject.toml"}, num_cpus=2, include_dashboard=False)

# %% [markdown]
# The kernel does not have numpy: tasks import what they need.


# %%
@ray.remote
def throw(dice: int) -> int:
    """Throw that many dice."""
    import numpy as np

    return int(np.random.default_rng().integers(1, 7, dice).sum())


print(sum(ray.get([throw.remote(1000) for _ in range(4)])))

# %% [markdown]
# After an edit of the project (`uv add`) run this cell: the helper pins the content of the files, so that the next task
# gets the new environment; the old one stays for those that have it. What `ray.init` said counts until the next one.

# %%
edited = ray_envcache.runtime_env("../project")
print(ray.get(throw.options(runtime_env=edited).remote(1000)))

# %% [markdown]
# What is in the store, and who uses it.

# %%
for one in ray_envcache.Store.open().environments():
    print(one.key[:12], one.project, f"{one.size_bytes / 1e6:.0f} MB", "in use" if one.in_use else "idle")

# %%
ray.shutdown()
