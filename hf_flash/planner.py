"""`hf_flash.planner.plan`, the name in the documentation. The planner itself is `hf_flash.planning.planner`."""

from hf_flash.planning.planner import ExpertOutlook, Plan, needs, plan

__all__ = ["ExpertOutlook", "Plan", "needs", "plan"]
