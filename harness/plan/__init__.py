"""What has to be computed: Model x Chip x Scenario -> problems; problems x kernels -> trials."""

from klab.harness.plan.planner import plan
from klab.harness.plan.rows import Plan, Row, Totals
from klab.harness.plan.scenario import Scenario, scenario_for

__all__ = ["Plan", "Row", "Scenario", "Totals", "plan", "scenario_for"]
