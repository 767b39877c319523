"""Who hears how a build goes: `progress` shows it to people, and to the log of an agent."""

from __future__ import annotations

import logging
from pathlib import Path

from ray_envcache.build.plan import Plan
from ray_envcache.store.leases import Lease

_logger = logging.getLogger(__name__)


class Observer:
    """Hears how a build goes. Methods may raise: that ends the waiting or the build."""

    def waiting(self, builder: str) -> None:
        """About once a second: another process, `builder`, builds this environment."""

    def started(self, plan: Plan) -> None:
        """A build begins."""

    def line(self, text: str) -> None:
        """Uv said something (credentials removed)."""

    def note(self, text: str) -> None:
        """Something that stays worth knowing when all is done."""
        _logger.warning(text)

    def finished(self, lease: Lease, seconds: float) -> None:
        """The environment is ready."""

    def compiling(self, staged: Path) -> None:
        """Its bytecode is compiled, into this folder until all of it is there."""
