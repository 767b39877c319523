"""The hold: every interpreter of an environment keeps a shared flock on its entry's `in-use` file, for life.

The text of this file is copied into each environment, where a `.pth` line imports it at start-up. It therefore
imports the standard library only, does as little as it can, and must never break the start of an interpreter.
Forked children share the flock; a SIGKILL frees it; it covers notebooks and cron jobs that merely run
`venv/bin/python` as well as Ray's workers.
"""


def _hold() -> "int | None":
    import fcntl
    import os
    import time

    # <entry>/venv/lib/pythonX.Y/site-packages/<this file>; a layer has a link to the file of the environment below.
    entry = os.path.realpath(__file__)
    for _ in range(5):
        entry = os.path.dirname(entry)
    path = os.path.join(entry, "in-use")
    held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    # Out of the way of programs that expect certain low descriptors, such as a closed stdin's; where few are allowed
    # at least of the standard streams, and without any to spare it stays where it is.
    for least in (64, 3):
        try:
            moved = fcntl.fcntl(held, fcntl.F_DUPFD_CLOEXEC, least)
        except OSError:
            continue
        os.close(held)
        held = moved
        break
    # Exclusive holders are a lister that looks whether the entry is free, and a collector that removes it. Both need
    # milliseconds, but either may be stopped in between. So the hold waits until it has the flock, or until the path
    # no longer names this file: then the entry is gone. After a minute the interpreter starts without a hold, which
    # `ray-envcache why` still shows: the flock is that of a process that was stopped and forgotten.
    pause, deadline = 0.001, time.monotonic() + 60
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if not os.path.samestat(os.stat(path), os.fstat(held)) or time.monotonic() > deadline:
                os.close(held)
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        else:
            break
    lower = os.environ.get("RAY_ENVCACHE_READONLY_DIRS", "").split(":")
    if not any(entry.startswith(os.path.join(os.path.realpath(root), "v1", "")) for root in lower if root):
        try:
            os.utime(held)
        except OSError:
            pass  # when it was last used matters less than that it runs: read-only file system, or not the owner
    return held


def _explain_refused_writes() -> None:
    """Say below the traceback of a write that was refused what this environment is, and where to write instead."""
    import os
    import sys

    before = sys.excepthook
    if hasattr(before, "of_ray_envcache"):
        return  # a layer's environment has this module twice

    def hook(kind, value, trace) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001  # typing takes long to import
        before(kind, value, trace)
        try:
            path = os.path.abspath(os.fsdecode(value.filename))
            if value.errno in {1, 13, 30} and path.startswith(sys.prefix + os.sep):  # EPERM, EACCES, EROFS
                what = "this environment is shared by all Ray clusters of this host (ray-envcache) and never changes"
                sys.stderr.write(f"hint: {what}; write elsewhere, most packages have a variable for that\n")
        except Exception:
            pass  # the traceback is there

    hook.of_ray_envcache = True  # type: ignore[attr-defined]
    sys.excepthook = hook


try:
    _explain_refused_writes()
    HELD = _hold()
except Exception:
    HELD = None
