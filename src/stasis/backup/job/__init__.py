# SPDX-License-Identifier: Apache-2.0
"""Making backups of point-in-time sources."""

from stasis.backup.job.create import CreateOptions, CreateResult, Plan, create, plan
from stasis.backup.job.selfcheck import SampleOptions
from stasis.backup.job.state import RunLock

__all__ = ["CreateOptions", "CreateResult", "Plan", "RunLock", "SampleOptions", "create", "plan"]
