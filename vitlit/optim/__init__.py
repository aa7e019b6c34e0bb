"""Parameter groups, learning-rate schedules, and an optimizer that torch lacks."""

from vitlit.optim.groups import Groups, OptimizerFactory, build_optimizer, table
from vitlit.optim.lamb import LAMB
from vitlit.optim.schedule import Schedule, follow_schedule

__all__ = ["LAMB", "Groups", "OptimizerFactory", "Schedule", "build_optimizer", "follow_schedule", "table"]
